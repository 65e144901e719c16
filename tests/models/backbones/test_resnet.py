"""ResNet against torchvision with random weights and running statistics.

Distances are the largest difference relative to the expected array's largest value.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util

from crn_jax import parallel
from crn_jax.convert import torchvision as names
from crn_jax.models.backbones import resnet
from tests import (
  release,  # noqa: F401 (before torchvision)
  torch_cpu,  # noqa: F401 (before torchvision)
)

import torchvision  # isort: skip

pytestmark = pytest.mark.usefixtures("quick_compile")

BLOCKS = {"BasicBlock": resnet.BASIC, "Bottleneck": resnet.BOTTLENECK}
STAGES = ("layer1", "layer2", "layer3", "layer4")


@functools.cache
def torch_model(depths, block: str = "Bottleneck") -> torch.nn.Module:
  """torchvision's model with made-up values; gentle enough that no stage explodes."""
  torch.manual_seed(0)
  model = torchvision.models.ResNet(getattr(torchvision.models.resnet, block), list(depths))
  for name, value in model.state_dict().items():
    if name.endswith("running_mean"):
      value.normal_(0, 0.2)
    elif name.endswith("running_var"):
      value.uniform_(0.5, 1.5)
    elif value.is_floating_point() and ("bn" in name or "downsample.1" in name):
      value.copy_(torch.randn_like(value) * 0.1 + (0.5 if name.endswith("weight") else 0.0))
  return model


def images(batch: int = 4, side: int = 96) -> np.ndarray:
  return np.random.default_rng(0).normal(size=(batch, side, side, 3)).astype(np.float32)


def torch_features(model, pictures: np.ndarray) -> list[torch.Tensor]:
  """Outputs of the four stages, in torchvision's layout."""
  x = torch.from_numpy(pictures).permute(0, 3, 1, 2)
  x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
  return [x := getattr(model, stage)(x) for stage in STAGES]


def jax_variables(depths, module=None, state=None, block: str = "Bottleneck") -> dict:
  module = module or resnet.ResNet(depths=depths, expansion=BLOCKS[block])
  like = jax.eval_shape(
    lambda: module.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
  )
  state = state or torch_model(depths, block).state_dict()
  return names.load_resnet(like, {k: v.numpy() for k, v in state.items()}, "made up")


def distance(value, expected) -> float:
  value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
  return np.abs(value - expected).max() / np.abs(expected).max()


def nhwc(x: torch.Tensor) -> np.ndarray:
  return x.detach().permute(0, 2, 3, 1).numpy()


RESNET50 = (3, 4, 6, 3)
RESNET18 = (2, 2, 2, 2)
# Gradients are compared in fewer layers and in float64, where no kink of a ReLU is crossed.
SHALLOW = (1, 1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "depths", "block", "map_dim"),
  [("resnet50", RESNET50, "Bottleneck", 2048), ("resnet18", RESNET18, "BasicBlock", 512)],
)
def test_every_stage_is_that_of_torchvision(name, depths, block, map_dim):
  module = resnet.ResNet(**resnet.VARIANTS[name])
  variables = jax_variables(depths, module, block=block)
  out = jax.jit(lambda v, x: module.apply(v, x, train=False))(variables, images())
  with torch.no_grad():
    expected = torch_features(torch_model(depths, block).eval(), images())
  assert len(out.stages) == len(expected)
  for stage, value, wanted in zip(STAGES, out.stages, expected, strict=True):
    assert distance(value, nhwc(wanted)) < 1e-5, stage
  np.testing.assert_array_equal(out.map, out.stages[-1])
  assert module.map_dim == out.map.shape[-1] == map_dim


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_training_of_resnet_is_that_of_torchvision(block):
  """Features of every stage, gradient of a loss, moved running statistics; 1e-9 in float64."""
  model = torch_model(SHALLOW, block).double().train()
  before = {k: v.clone() for k, v in model.state_dict().items()}
  pictures = images(side=64).astype(np.float64)
  weight = np.random.default_rng(1).normal(size=(512 * BLOCKS[block],))
  expected = torch_features(model, pictures)
  loss = (expected[-1].mean((2, 3)) @ torch.from_numpy(weight)).square().mean()
  loss.backward()
  gradients = {k: p.grad.numpy() for k, p in model.named_parameters() if p.grad is not None}
  moved = {k: v.numpy().copy() for k, v in model.state_dict().items() if "running" in k}
  model.load_state_dict(before)
  model.float()
  with release.double_precision():
    module = resnet.ResNet(depths=SHALLOW, expansion=BLOCKS[block], dtype=jnp.float64)
    variables = jax.tree.map(
      lambda x: jnp.asarray(x, jnp.float64), jax_variables(SHALLOW, module, before)
    )

    def loss_of(params, variables):
      out, updated = module.apply(
        variables | {"params": params}, pictures, train=True, mutable=["batch_stats"]
      )
      return ((out.map.mean((1, 2)) @ weight) ** 2).mean(), (out, updated)

    run = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (value, (out, updated)), grads = jax.device_get(run(variables["params"], variables))
  assert abs(value / loss.item() - 1) < 1e-9
  for stage, ours, wanted in zip(STAGES, out.stages, expected, strict=True):
    assert distance(ours, nhwc(wanted)) < 1e-9, stage
  ours = names.to_torchvision({"params": grads, "batch_stats": updated["batch_stats"]})
  for name, wanted in (gradients | moved).items():
    assert distance(ours[name], wanted) < 1e-9, name
  assert set(ours) == {k for k in before if not k.startswith("fc.")}


def sums_of_gradient(remat: str) -> int:
  """Reductions in the program of a gradient."""
  sizes = {"width": 8, "depths": (2, 2)}
  module, pictures = resnet.ResNet(**sizes, remat=remat), jnp.zeros((2, 32, 32, 3))
  plain = resnet.ResNet(**sizes)
  like = jax.eval_shape(lambda: plain.init(jax.random.key(0), pictures, train=False))

  def loss(params, batch_stats):
    variables = {"params": params, "batch_stats": batch_stats}
    return jnp.sum(module.apply(variables, pictures, train=True, mutable=["batch_stats"])[0].map)

  program = jax.jit(jax.grad(loss)).lower(like["params"], like["batch_stats"]).as_text()
  return program.count("stablehlo.reduce(")


def test_statistics_of_a_batch_are_kept_for_the_gradient():
  """Each is a pass over a whole map: 'dots' sums as often as 'none', 'full' again."""
  assert sums_of_gradient("dots") == sums_of_gradient("none") < sums_of_gradient("full")


@pytest.mark.slow
def test_batch_statistics_are_those_of_all_devices():
  """Features and moved running statistics of a batch over two devices; 1e-5."""
  sizes = {"width": 8, "depths": (1, 1)}
  rng = np.random.default_rng(0)
  pictures = images(batch=4, side=32)
  alone = resnet.ResNet(**sizes)
  shapes = jax.eval_shape(lambda: alone.init(jax.random.key(0), pictures, train=False))
  variables = jax.tree.map(
    lambda s: np.abs(rng.normal(size=s.shape)).astype(np.float32) * 0.2, shapes
  )

  def apply(module, variables, x):
    return module.apply(variables, x, train=True, mutable=["batch_stats"])

  expected, moved = jax.jit(functools.partial(apply, alone))(variables, pictures)
  dp = parallel.DataParallel.create("shard_map", jax.devices()[:2])
  over_devices = dp.map(
    functools.partial(apply, alone.clone(axis_name=parallel.AXIS)),
    outputs=(parallel.SHARDED, parallel.REPLICATED),
  )
  out, moved_over_devices = over_devices(dp.replicate(variables), dp.shard(pictures))
  assert distance(out.map, expected.map) < 1e-5
  for a, b, before in zip(
    jax.tree.leaves(moved_over_devices), jax.tree.leaves(moved),
    jax.tree.leaves(variables["batch_stats"]), strict=True,
  ):  # fmt: skip
    assert distance(a, b) < 1e-5
    assert distance(b, before) > 0.01


def test_any_size_is_an_image():
  """Odd grids are rounded up, as in torchvision: 40 x 52 -> 10 x 13 -> 5 x 7 -> 3 x 4 -> 2 x 2."""
  module = resnet.ResNet(width=4)
  out = jax.eval_shape(
    lambda: module.init_with_output(jax.random.key(0), jnp.zeros((1, 40, 52, 3)), train=False)[0]
  )
  assert [s.shape[1:] for s in out.stages] == [(10, 13, 16), (5, 7, 32), (3, 4, 64), (2, 2, 128)]


class TestConversion:
  @pytest.mark.parametrize(
    ("name", "depths", "block"),
    [("resnet50", RESNET50, "Bottleneck"), ("resnet18", RESNET18, "BasicBlock")],
  )
  def test_there_and_back(self, name, depths, block):
    """Every weight and running statistic, by torchvision's own strict loading."""
    state = torch_model(depths, block).state_dict()
    arguments, variables = names.load({k: v.numpy() for k, v in state.items()}, "made up")
    assert arguments == resnet.VARIANTS[name]
    back = names.to_torchvision(variables)
    other = getattr(torchvision.models, name)(weights=None)
    other.fc = torch.nn.Identity()
    other.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in back.items()})
    for name, value in other.state_dict().items():
      if not name.endswith("num_batches_tracked"):
        assert torch.equal(value, state[name]), name

  @pytest.mark.parametrize(
    ("change", "message"),
    [
      (lambda s: s.pop("bn1.running_mean"), "missing bn1.running_mean"),
      (lambda s: s.update({"layer9.extra": torch.zeros(1)}), "unexpected layer9.extra"),
      (
        lambda s: s.update({"layer1.0.conv2.weight": torch.zeros(64, 64, 1, 1)}),
        r"layer1.0.conv2.weight has shape .* where \(3, 3, 64, 64\) is expected",
      ),
    ],
  )
  def test_other_weights_are_refused_with_what_differs(self, change, message):
    state = dict(torch_model(SHALLOW).state_dict())
    change(state)
    with pytest.raises(ValueError, match=message) as error:
      jax_variables(SHALLOW, state=state)
    assert str(error.value).startswith("made up: not the weights of this ResNet (1 differences)")


def test_the_names_do_not_clash():
  """No two variables have the same name in torchvision."""
  flat = traverse_util.flatten_dict(jax_variables(SHALLOW))
  assert len({names.torchvision_name(path[1:]) for path in flat}) == len(flat)
