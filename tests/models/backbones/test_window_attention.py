"""The fused kernel beside the plain computation, interpreted, so without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crn_jax import plan
from crn_jax.models.backbones import swin, window_attention
from crn_jax.models.backbones.window_attention import Windows

# grid, window size, shifted: masks of all kinds, one window along an axis, windows of 16 positions.
CASES = {
  "shifted": ((14, 21), 7, True),
  "plain": ((14, 14), 7, False),
  "one window": ((7, 7), 7, True),
  "shifted along an axis": ((14, 7), 7, True),
  "small windows": ((8, 8), 4, True),
}
HEADS, DIM, BATCH = 2, 16, 3


def results(module, x, params):
  """Output, and gradients by input and parameters of a sum with random weights; float64 arrays."""
  weights = jax.random.normal(jax.random.key(2), x.shape)

  def weighted(x, params):
    out = module.apply({"params": params}, x)
    return jnp.sum(out.astype(jnp.float32) * weights), out

  grads, out = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(x, params)
  return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves((out, grads))]


@pytest.fixture
def fused(monkeypatch):
  """Switches the kernel on, interpreted."""

  def switch():
    attend = window_attention.attend
    monkeypatch.setattr(window_attention, "chosen", lambda *_: True)
    monkeypatch.setattr(
      window_attention, "attend", lambda qkv, bias, windows: attend(qkv, bias, windows, True)
    )

  return switch


def case(name, dtype):
  grid, size, shifted = CASES[name]
  module = swin.WindowAttention(HEADS, size, shifted, jnp.dtype(dtype))
  x = jax.random.normal(jax.random.key(0), (BATCH, *grid, HEADS * DIM)).astype(dtype)
  params = module.init(jax.random.key(1), x)["params"]
  # timm's start, 0.02, would leave attention nearly even: a wrong bias or mask could not be seen.
  params = jax.tree.map(lambda p: p * 10 if p.ndim == 2 else p, params)
  return module, x, params


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_computes_the_plain_attention(name, fused):
  """Output and every gradient, float32: 1e-5 of an array's largest value."""
  module, x, params = case(name, "float32")
  expected = results(module, x, params)
  fused()
  for got, wanted in zip(results(module, x, params), expected, strict=True):
    assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("name", ["shifted", "plain"])
def test_in_bfloat16_it_differs_by_rounding_only(name, fused):
  """Distance from float32: at most 1.5 times that of the plain computation in bfloat16.

  The linear layers' biases are left out: their gradients are sums over all positions, whose
  rounding depends on an order that the compiler chooses, and attention has no part in it.
  """
  module, x, params = case(name, "bfloat16")
  exact = results(module.clone(dtype=jnp.float32), x.astype(jnp.float32), params)
  plain = results(module, x, params)
  fused()
  got = results(module, x, params)
  for array, by_plain, wanted in zip(got, plain, exact, strict=True):
    if array.ndim == 1:
      continue
    distance, of_plain = (np.linalg.norm(a - wanted) for a in (array, by_plain))
    assert distance <= 1.5 * of_plain + 1e-6 * np.linalg.norm(wanted)


def test_masked_positions_have_no_attention(fused):
  """Values and keys across a region's border do not matter; those beside it do."""
  del fused
  windows = Windows.of_grid((8, 8), 4, True)
  qkv = jax.random.normal(jax.random.key(0), (1, 8, 8, 3, 1, 16))
  bias = jnp.zeros((1, 16, 16))
  out = window_attention.attend(qkv, bias, windows, True)
  # The last window holds rows 6, 7, 0, 1 of the grid, whose borders are masked.
  moved = window_attention.attend(qkv.at[:, 0, 0].add(50.0), bias, windows, True)
  changed = np.any(np.asarray(out != moved), axis=(0, 3, 4))
  assert {tuple(at) for at in np.argwhere(changed)} == {(y, x) for y in (0, 1) for x in (0, 1)}


def test_it_is_chosen_for_bfloat16_on_a_gpu_where_it_fits(monkeypatch):
  grid, bfloat16 = (14, 14), jnp.bfloat16
  windows = Windows.of_grid(grid, 7, True)
  assert not window_attention.chosen(bfloat16, 32, grid, windows)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert window_attention.chosen(bfloat16, 32, grid, windows)
  assert not window_attention.chosen(jnp.float32, 32, grid, windows)
  assert not window_attention.chosen(bfloat16, 24, grid, windows)
  assert not window_attention.chosen(bfloat16, 8, grid, windows)
  padded = Windows.of_grid((12, 14), 7, True)
  assert not window_attention.chosen(bfloat16, 32, (12, 14), padded)
  assert not window_attention.chosen(bfloat16, 32, (18, 18), Windows.of_grid((18, 18), 9, False))
  monkeypatch.setattr(window_attention, "triton", None)
  assert not window_attention.chosen(bfloat16, 32, grid, windows)


def test_its_gradient_can_be_compiled_for_a_gpu():
  """Without one: the kernel's program is written, which finds what the compiler cannot hold."""
  windows = Windows.of_grid((14, 14), 7, True)
  qkv = jax.ShapeDtypeStruct((2, 14, 14, 3, 2, 32), jnp.bfloat16)
  bias = jax.ShapeDtypeStruct((2, 49, 49), jnp.float32)

  def gradient(qkv, bias):
    out, pull_back = jax.vjp(lambda q, b: window_attention.attend(q, b, windows), qkv, bias)
    return pull_back(out)

  # From JAX 0.11 on Triton's compiler has to know the card, here from the mesh.
  card = jax.sharding.AbstractDevice("NVIDIA A100-SXM4-40GB", num_cores=None, platform="gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=card)
  with jax.sharding.use_abstract_mesh(mesh):
    text = jax.jit(gradient).trace(qkv, bias).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("triton") >= 2


def test_its_products_are_counted():
  """With what fills up a window: 64 x 64 logits of 49 positions, forward two products."""
  windows = Windows.of_grid((14, 14), 7, True)
  qkv = jax.ShapeDtypeStruct((2, 14, 14, 3, 2, 32), jnp.bfloat16)
  bias = jax.ShapeDtypeStruct((2, 49, 49), jnp.float32)
  traced = jax.make_jaxpr(lambda q, b: window_attention.attend(q, b, windows))(qkv, bias)
  assert plan.flops(traced.jaxpr) == 2 * 4 * 2 * (2 * 2 * 64 * 64 * 32)
