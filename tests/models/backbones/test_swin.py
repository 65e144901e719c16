"""Swin Transformer: timm's names, shapes and layout, and free image sizes.

Values are compared in test_forward_parity. tests/goldens/timm_swin_keys.json lists names, shapes,
windows, shifts and stochastic depth of timm 1.0.31's models.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from crn_jax.convert import layout, timm
from crn_jax.models.backbones import swin
from crn_jax.models.backbones.window_attention import Windows
from tests import release

TIMM = release.load_json("timm_swin_keys.json")["models"]
SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}


def shapes(model: swin.SwinTransformer, height=32, width=32, seen=None):
  """Parameter shapes; `seen` collects (module, arguments) of every call."""

  def collect(next_method, args, kwargs, context):
    if seen is not None and context.method_name == "__call__":
      seen.append((context.module, args))
    return next_method(*args, **kwargs)

  with nn.intercept_methods(collect):
    return jax.eval_shape(
      lambda: model.init(jax.random.key(0), jnp.zeros((1, height, width, 3)), train=False)
    )["params"]


def torch_shape(flax_shape, leaf: str, name: str) -> list[int]:
  if leaf not in layout.KERNELS:
    return list(flax_shape)
  inputs, outputs = flax_shape
  return [outputs, 3, 4, 4] if name == "patch_embed.proj.weight" else [outputs, inputs]


@pytest.fixture(scope="module", params=TIMM)
def variant(request):
  """timm's facts, our parameter shapes, and the calls that made them."""
  seen = []
  model = swin.SwinTransformer(**swin.VARIANTS[request.param.removesuffix("_patch4_window7_224")])
  return TIMM[request.param], shapes(model, 224, 224, seen), seen


def test_names_and_shapes_are_those_of_timm(variant):
  facts, params, _ = variant
  ours = {
    timm.timm_name(path): torch_shape(value.shape, path[-1], timm.timm_name(path))
    for path, value in traverse_util.flatten_dict(params).items()
  }
  assert ours == {k: v for k, v in facts["keys"].items() if not k.startswith("head.")}


def test_windows_shifts_and_stochastic_depth_are_those_of_timm(variant):
  facts, _, seen = variant
  blocks = [m for m, _ in seen if isinstance(m, swin.SwinBlock)]
  attentions = [
    Windows.of_grid(args[0].shape[1:3], m.window_size, m.shifted)
    for m, args in seen
    if isinstance(m, swin.WindowAttention)
  ]
  flat = {
    k: [v for stage in facts[k] for v in stage]
    for k in ("drop_path_rates", "window_per_block", "shift_per_block")
  }
  rates = swin.drop_path_rates(0.1, len(blocks))
  np.testing.assert_allclose(rates, flat["drop_path_rates"], atol=1e-7)
  assert [list(w.window) for w in attentions] == flat["window_per_block"]
  assert [list(w.shift) for w in attentions] == flat["shift_per_block"]


def state_dict(params) -> dict[str, np.ndarray]:
  """Random weights under timm's names."""
  rng = np.random.default_rng(0)
  flat = {
    timm.timm_name(p): (p[-1], v.shape) for p, v in traverse_util.flatten_dict(params).items()
  }
  return {
    name: rng.normal(size=torch_shape(shape, leaf, name)).astype(np.float32)
    for name, (leaf, shape) in flat.items()
  }


def old_names(weights, facts) -> dict[str, np.ndarray]:
  """The same as timm before 0.9 saved them, with its buffers and classifier."""
  old = {facts["renamed_in_old_timm"].get(k, k): v for k, v in weights.items()}
  return old | {
    "layers.0.blocks.0.attn.relative_position_index": np.zeros((49, 49), np.int64),
    "layers.0.blocks.1.attn_mask": np.zeros((64, 49, 49), np.float32),
    "head.weight": np.zeros((1000, 8)),
    "head.bias": np.zeros(1000),
  }


def test_names_of_old_timm_versions_are_understood():
  facts = TIMM["swin_tiny_patch4_window7_224"]
  weights = {k: np.float32(i) for i, k in enumerate(facts["keys"]) if not k.startswith("head.")}
  assert timm.modern_names(old_names(weights, facts)) == weights
  assert timm.modern_names(weights | {"head.fc.weight": np.float32(1)}) == weights


def test_loaded_weights_are_those_of_the_file():
  params = shapes(swin.SwinTransformer(**SMALL))
  weights = state_dict(params)
  loaded = timm.load_swin(params, weights, "swin.safetensors")
  assert jax.tree.structure(loaded) == jax.tree.structure(params)
  for path, value in traverse_util.flatten_dict(loaded).items():
    name = timm.timm_name(path)
    expected = weights[name]
    np.testing.assert_array_equal(layout.to_torch(value, path[-1], expected.shape), expected)
  qkv = loaded["stage0_block0"]["attn"]["qkv"]["kernel"]
  np.testing.assert_array_equal(qkv, weights["layers.0.blocks.0.attn.qkv.weight"].T)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda w: w.pop("norm.weight"), "missing norm.weight"),
    (lambda w: w.update({"layers.9.extra": w["norm.bias"]}), "unexpected layers.9.extra"),
    (
      lambda w: w.update({"layers.0.blocks.1.attn.relative_position_bias_table": np.zeros((9, 1))}),
      r"layers.0.blocks.1.attn.relative_position_bias_table has shape \(9, 1\) where \(49, 1\)",
    ),
    (
      lambda w: w.update({"layers.0.blocks.0.mlp.fc1.weight": np.zeros((32, 16))}),
      r"layers.0.blocks.0.mlp.fc1.weight has shape .* where \(16, 64\) is expected",
    ),
  ],
)
def test_weights_of_another_model_are_refused_with_what_differs(change, message):
  params = shapes(swin.SwinTransformer(**SMALL))
  weights = state_dict(params)
  change(weights)
  with pytest.raises(ValueError, match=message) as error:
    timm.load_swin(params, weights, "swin.safetensors")
  text = str(error.value)
  assert text.startswith("swin.safetensors: ")
  assert "(1 differences)" in text


@pytest.mark.parametrize(
  ("height", "width", "grids"),
  [
    (32, 32, [(8, 8), (4, 4)]),
    # Rows and columns are padded to whole windows: 10 x 14 tokens with windows of 4.
    (40, 56, [(10, 14), (5, 7)]),
    # An odd grid is padded to merge: 9 x 5 -> 5 x 3, smaller than a window in one direction.
    (36, 20, [(9, 5), (5, 3)]),
  ],
)
def test_any_multiple_of_the_patch_size_is_an_image(height, width, grids):
  model = swin.SwinTransformer(**SMALL)
  images = jax.random.normal(jax.random.key(0), (2, height, width, 3))
  run = jax.jit(lambda x: model.init_with_output(jax.random.key(1), x, train=False)[0])
  out = run(images)
  assert out.map.shape == (2, *grids[1], 32)
  assert [s.shape for s in out.stages] == [(2, *grids[1], 32)] * 2
  assert np.isfinite(out.map).all()


def test_a_token_of_a_first_block_sees_its_window_only():
  """10 x 14 tokens, windows of 4, one block without shift: the padding does not leak rows."""
  model = swin.SwinTransformer(embed_dim=16, depths=(1,), num_heads=(1,), window_size=4)
  images = jax.random.normal(jax.random.key(0), (1, 40, 56, 3))
  variables = model.init(jax.random.key(1), images, train=False)
  # A patch in the last row and column of windows, which are partly padding.
  changed = images.at[:, 36:40, 52:56].add(1.0)
  a, b = (model.apply(variables, x, train=False).map for x in (images, changed))
  differs = np.asarray((jnp.abs(a - b) > 0).any(-1)[0])
  expected = np.zeros((10, 14), bool)
  expected[8:, 12:] = True
  np.testing.assert_array_equal(differs, expected)


def test_an_image_that_is_no_multiple_of_the_patch_size_is_refused():
  with pytest.raises(ValueError, match="30 x 32: not a multiple of the patch size 4"):
    shapes(swin.SwinTransformer(**SMALL), 30, 32)
