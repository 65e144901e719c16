"""Stacked blocks: the same values in another layout, and the same numbers from a scan."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from crn_jax.errors import UserError
from crn_jax.models import remat
from crn_jax.models.backbones import resnet, stacking, swin

pytestmark = pytest.mark.usefixtures("quick_compile")

# Stages of one pair, of three and a block without a partner, and of two.
SIZES = {"embed_dim": 8, "depths": (2, 7, 4), "num_heads": (1, 2, 2), "window_size": 2,
         "drop_path_rate": 0.5}  # fmt: skip
BATCH = 6


def images(batch: int = BATCH) -> np.ndarray:
  return np.random.default_rng(0).normal(size=(batch, 64, 64, 3)).astype(np.float32)


def shapes(module):
  return jax.eval_shape(lambda: module.init(jax.random.key(0), images(1), train=False))


@functools.cache
def variables() -> dict:
  """Unstacked, made up."""
  rng = np.random.default_rng(1)

  def value(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    return noise / 4 if path[-1].key == "kernel" else (path[-1].key == "scale") + 0.1 * noise

  return jax.tree_util.tree_map_with_path(value, shapes(swin.SwinTransformer(**SIZES)))


def equal(a, b) -> bool:
  same = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool((x == y).all()), a, b)
  return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


def test_pairs_of_a_stage_become_arrays_with_an_axis_of_pairs():
  unstacked = variables()["params"]
  stacked = stacking.stack(unstacked)
  blocks = {name for name in stacked if "block" in name or "pairs" in name}
  assert blocks == {"stage0_block0", "stage0_block1", "stage1_pairs", "stage1_block6",
                    "stage2_pairs"}  # fmt: skip
  kernel = stacked["stage1_pairs"]["second"]["attn"]["qkv"]["kernel"]
  assert kernel.shape == (3, 16, 48)
  np.testing.assert_array_equal(kernel[1], unstacked["stage1_block3"]["attn"]["qkv"]["kernel"])


@pytest.mark.parametrize("convert", [lambda x: x, lambda x: jax.tree.map(jnp.asarray, x)])
def test_there_and_back_nothing_changes(convert):
  """However deep in a tree, of numpy and of JAX; and twice is once."""
  tree = convert(variables())
  moments = optax.adam(0.1).init({"local": {"backbone": tree["params"]}})
  for value in (tree, moments):
    stacked = stacking.stack(value)
    assert equal(stacking.unstack(stacked), value)
    assert equal(stacking.stack(stacked), stacked)
    assert equal(stacking.unstack(value), value)
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(value))


def test_one_array_is_unstacked_like_a_whole_tree():
  stacked = stacking.stack(variables()["params"])
  flat = {}
  for path, value in traverse_util.flatten_dict(stacked).items():
    leaf = traverse_util.unflatten_dict({path: value})
    flat |= traverse_util.flatten_dict(stacking.unstack(leaf))
  assert equal(traverse_util.unflatten_dict(flat), variables()["params"])


def test_a_resnet_is_not_stacked():
  """Its blocks are not alike: the first one of a stage has a projection."""
  tree = shapes(resnet.ResNet(width=4, depths=(4, 6)))
  assert jax.tree.structure(jax.eval_shape(stacking.stack, tree)) == jax.tree.structure(tree)


def features_and_gradient(module, variables, train=True):
  def loss(params):
    out = module.apply(
      {"params": params}, images(), train=train, undropped=1 if train else 0,
      rngs={"drop_path": jax.random.key(3)},
    )  # fmt: skip
    return jnp.sum(jnp.sin(out.map)), out

  run = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, out), gradient = run(variables["params"])
  return jax.device_get((out, stacking.unstack(gradient)))


@functools.cache
def unrolled(dtype: str, train: bool):
  module = swin.SwinTransformer(**SIZES, dtype=jnp.dtype(dtype))
  return features_and_gradient(module, variables(), train)


def check(got, expected, bound):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() < bound * np.abs(b).max()


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("choice", remat.CHOICES)
def test_a_scan_computes_what_one_block_after_the_other_does(choice, train):
  """Features and gradients with stochastic depth; 1e-5 of an array's largest value, in float32."""
  module = swin.SwinTransformer(**SIZES, remat=choice)
  got = features_and_gradient(module, stacking.stack(variables()), train)
  check(got, unrolled("float32", train), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["dots", "full"])
def test_rematerialisation_needs_less_memory(choice):
  """XLA's own count of a gradient's temporary memory, and the same gradient."""
  sizes = SIZES | {"depths": (2, 8), "num_heads": (1, 2)}
  needed = {}
  for remat_choice in ("none", choice):
    module = swin.SwinTransformer(**sizes, remat=remat_choice)
    like = jax.eval_shape(stacking.stack, shapes(module))
    x = jax.ShapeDtypeStruct((16, 64, 64, 3), np.float32)

    def loss(params, x, module=module):
      return jnp.sum(module.apply(params, x, train=False).map)

    compiled = jax.jit(jax.grad(loss)).lower(like, x).compile()
    needed[remat_choice] = compiled.memory_analysis().temp_size_in_bytes
  assert needed[choice] < 0.7 * needed["none"], needed


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["dots", "full"])
def test_rematerialisation_of_a_resnet_changes_no_number(choice):
  """Features, gradients and moved running statistics; 1e-5 of an array's largest value."""
  results = {}
  for name in ("none", choice):
    module = resnet.ResNet(width=8, depths=(2, 1), remat=name)
    start = jax.jit(module.init, static_argnames="train")(jax.random.key(0), images(), train=False)

    def loss(params, start=start, module=module):
      out, moved = module.apply(
        start | {"params": params}, images(), train=True, mutable=["batch_stats"]
      )
      return jnp.sum(jnp.sin(out.map)), (out, moved)

    results[name] = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(start["params"]))
  check(results[choice], results["none"], 1e-5)


def test_an_unknown_rematerialisation_is_refused_by_name():
  with pytest.raises(UserError, match="model.remat.*'none', 'dots', 'full'.*'all'"):
    shapes(swin.SwinTransformer(**SIZES, remat="all"))


def test_stochastic_depth_draws_what_it_always_drew():
  """Old seeds are promised: version 0.1 drew this. The last picture, undropped, changes nothing.

  Kept pictures (1) of the two units of every block.
  """
  seen = []

  def collect(next_method, args, kwargs, context):
    if isinstance(context.module, swin.SwinBlock) and context.method_name == "__call__":
      seen.append(np.asarray(args[1]))
    return next_method(*args, **kwargs)

  module = swin.SwinTransformer(**SIZES | {"depths": (2, 3), "num_heads": (1, 2)})
  x = jnp.zeros((4, 16, 16, 3))
  variables = module.init(jax.random.key(0), x, train=False)
  with nn.intercept_methods(collect):
    module.apply(variables, x, train=True, undropped=1, rngs={"drop_path": jax.random.key(599)})
  kept = [["111", "111"], ["111", "111"], ["011", "110"], ["101", "010"], ["011", "001"]]
  for factors, block, rate in zip(seen, kept, (0, 0.125, 0.25, 0.375, 0.5), strict=True):
    expected = [[int(bit) / (1 - rate) for bit in unit] + [1] for unit in block]
    np.testing.assert_allclose(factors, expected, rtol=1e-7)


def test_the_factor_of_stochastic_depth_is_not_rounded_to_bfloat16():
  """It is float32, and so is its product: 9 / 0.9 is 10, with a bfloat16 factor it is 9.98."""
  seen = []

  def collect(next_method, args, kwargs, context):
    if isinstance(context.module, swin.SwinBlock) and context.method_name == "__call__":
      seen.append(args[1])
    return next_method(*args, **kwargs)

  module = swin.SwinTransformer(**SIZES, dtype=jnp.bfloat16)
  with nn.intercept_methods(collect):
    jax.eval_shape(
      lambda: module.apply(variables(), images(), train=True, rngs={"drop_path": jax.random.key(0)})
    )
  assert {factors.dtype for factors in seen} == {jnp.dtype(jnp.float32)}
  nine = jnp.full((1, 1, 1, 1), 9, jnp.bfloat16)
  product = swin._scaled(nine, jnp.asarray([1 / 0.9], jnp.float32))
  assert product.dtype == jnp.float32
  assert float(product[0, 0, 0, 0]) == 10.0
