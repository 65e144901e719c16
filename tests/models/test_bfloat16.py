"""bfloat16: what must stay in float32.

On a CPU XLA may leave out the rounding to bfloat16 between two operations, so that numbers would
not show it: the traced program is looked at.
"""

import collections

import jax
import jax.numpy as jnp
import pytest

from crn_jax.models import crn
from tests import tiny_model as tiny


def equations(jaxpr):
  """All of a program, those of functions that it calls included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, list | tuple) else [value]:
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from equations(inner)


@pytest.mark.parametrize(("dtype", "logits"), [("bfloat16", "float32"), ("float32", "float32")])
@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_attention_logits_are_summed_in_float32(kind, dtype, logits):
  """Of every block of the backbone and of the composition; what attention gathers is not."""
  config = tiny.config()
  config.model.dtype = dtype
  branch = tiny.model(config).branches[kind]
  image, tokens = jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 8), jnp.int32)
  variables = {k: v[kind] for k, v in tiny.variables(config).items()}
  traced = jax.make_jaxpr(
    lambda variables: branch.apply(
      variables, image, image, tokens, tokens == 0, train=False, modification=False,
      auxiliary=False,
    )
  )(variables)  # fmt: skip
  results = collections.Counter(
    str(equation.outvars[0].aval.dtype)
    for equation in equations(traced.jaxpr)
    if equation.primitive.name == "dot_general" and equation.params["dimension_numbers"][1][0]
  )
  attentions = sum(config.model.backbone.depths) + 1
  expected = collections.Counter({logits: attentions})
  expected[dtype] += attentions
  assert results == expected
