"""Golden numbers and weights of the release, for parity tests (see tests/goldens/README.md)."""

import contextlib
import ctypes
import gc
import json
import pathlib

import flax.core
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

from configs import default
from crn_jax.convert import release as names
from crn_jax.models import crn
from tests.goldens import recipe

GOLDENS = pathlib.Path(__file__).parent / "goldens"
VOCAB_SIZE = 35


def load_json(name: str) -> dict:
  return json.loads((GOLDENS / name).read_text())


SHAPES = {kind: load_json("forward_eval.json")[f"state_dict_small_{kind}"] for kind in crn.BRANCHES}


@contextlib.contextmanager
def double_precision():
  """float64 for what is traced inside; JAX's setting is as before afterwards."""
  # The first is the newer name.
  enable = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
  with enable(True):
    yield


with contextlib.suppress(OSError, AttributeError):
  # Linux's C library keeps freed blocks below a threshold that grows with what is freed, up to
  # 32 MB, which makes gigabytes here. Set, it stays: M_MMAP_THRESHOLD, bytes.
  ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)


def release_memory() -> None:
  """Gives what was freed back to the system, where it is Linux's C library that keeps it.

  The parity tests free and allocate gigabytes in turn, of which it would keep half.
  """
  gc.collect()
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def config(dtype: str = "float32"):
  """The small size that the goldens were made with: Swin-L's widths, less depth."""
  c = default.get_config("crn_released")
  c.model.backbone.update(
    embed_dim=192, num_heads=(6, 12, 24, 48), patch_size=4, depths=(2, 2, 1, 1), window_size=4,
    drop_path_rate=0.0,
  )  # fmt: skip
  c.model.dtype = dtype
  return c


def variable_shapes(branch: crn.Branch, image_size: int) -> dict:
  """Shapes of a branch's variables: {'params', 'batch_stats'}."""
  image, tokens = jnp.zeros((1, image_size, image_size, 3)), jnp.zeros((1, 3), jnp.int32)
  shapes = jax.eval_shape(
    lambda: branch.init(
      jax.random.key(0), image, image, tokens, tokens == 0, train=False, modification=True,
      auxiliary=True,
    )
  )  # fmt: skip
  return flax.core.unfreeze(shapes)


def variables(
  kind: str, branch: crn.Branch, dtype=np.float32, prefix: str = "", image_size: int = 64
) -> dict:
  """The recipe's weights in a branch's structure: {'params', 'batch_stats'}.

  Args:
    kind: 'local' or 'global'.
    branch: the module.
    dtype: of all.
    prefix: goes before the goldens' names; another prefix makes other weights.
    image_size: in pixels.
  """
  loaded = {}
  for collection, tree in variable_shapes(branch, image_size).items():
    state = {
      n: recipe.param(f"{prefix}{kind}.{n}", s) for n, s in names.torch_shapes(kind, tree).items()
    }
    loaded[collection] = names.load_branch(kind, tree, state)
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), loaded)


def nhwc(name: str, shape, dtype=np.float32) -> jnp.ndarray:
  """The recipe's image [batch, 3, h, w] as [batch, h, w, 3]."""
  return jnp.asarray(recipe.image(name, shape).transpose(0, 2, 3, 1), dtype)


def distance(goldens, name: str, value) -> float:
  """Largest difference to the golden array, relative to the golden's largest value.

  Args:
    goldens: a loaded .npz.
    name: of a golden stored whole or as a strided sample.
    value: computed array in PyTorch's layout.
  """
  value = np.asarray(value)
  if name in goldens.files:
    expected = goldens[name]
    value = value.reshape(expected.shape)
  else:
    expected = goldens[f"{name}#sample"]
    assert tuple(goldens[f"{name}#shape"]) == value.shape, (name, value.shape)
    value = value.reshape(-1)[:: int(goldens[f"{name}#step"])]
  return float(np.abs(value - expected).max() / np.abs(expected).max())
