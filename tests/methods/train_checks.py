"""What both parity tests of training ask of float32, within the bounds of `tests/rounding.py`.

Each function looks at one branch and says what is out of bounds.
"""

from tests.rounding import SAFETY
from tests.training import Scalars

# Pooling of a 1 x 1 map does not depend on its exponent: these have no true gradient.
NO_TRUE_GRADIENT = {
  ("local", "img_model.img_pool.p"),
  ("local", "local_pool.p"),
  ("global", "img_model.img_pool.p"),
}


def assert_losses_close(
  kind: str, got: dict[str, float], expected: dict[str, float], scales: dict[str, float]
) -> None:
  """Every term and their sum, relative to what is expected."""
  terms = [name for name in expected if name.startswith(kind)]
  assert len(terms) == (5 if kind == "local" else 4)
  for name in terms:
    apart = abs(got[name] / expected[name] - 1)
    assert apart < SAFETY * scales[name], (name, apart, scales[name])


def assert_gradients_close(
  kind: str, distances: Scalars, norms: Scalars, scales: Scalars, names: set[tuple[str, str]]
) -> None:
  """Every parameter's gradient as a vector: distance relative to the norm.

  Args:
    kind: branch.
    distances: of float32 to float64, relative to float64's norm.
    norms: of float32.
    scales: of the distances.
    names: of the parameters that a loss reaches; others have no gradient.
  """
  largest = max(norm for key, norm in norms.items() if key[0] == kind)
  checked = 0
  for key, apart in distances.items():
    if key[0] != kind:
      continue
    if key not in names:
      assert norms[key] == 0.0, key
    elif key in NO_TRUE_GRADIENT:
      assert norms[key] < 1e-6 * largest, key  # Rounding alone.
    else:
      assert apart < SAFETY * scales[key], (key, apart, scales[key])
      checked += 1
  assert checked > 100
