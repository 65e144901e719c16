"""The release's Adam and its learning-rate decay (PyTorch's formulas, computed by hand)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from configs import default
from crn_jax.methods import optimizer
from crn_jax.methods.crn import CRN

STEPS_PER_EPOCH = 7
RATE = 3e-5


def rate(step: int, epochs: int = 50, **changes) -> float:
  config = default.get_config().optimizer
  config.update(changes)
  schedule = optimizer.learning_rate(config, STEPS_PER_EPOCH, epochs * STEPS_PER_EPOCH)
  return float(schedule(step))


@pytest.mark.parametrize("epoch", [0, 1, 19, 20, 21, 40, 49])
def test_the_published_fashioniq_setting_never_decays(epoch):
  assert rate(epoch * STEPS_PER_EPOCH) == pytest.approx(RATE)


@pytest.mark.parametrize("max_decay_epoch", [30, 40])
@pytest.mark.parametrize(
  ("step", "factor"),
  [(0, 1.0), (20 * STEPS_PER_EPOCH - 1, 1.0), (20 * STEPS_PER_EPOCH, 0.1),
   (40 * STEPS_PER_EPOCH - 1, 0.1), (40 * STEPS_PER_EPOCH, 0.1), (50 * STEPS_PER_EPOCH - 1, 0.1)],
)  # fmt: skip
def test_the_other_published_settings_decay_once_at_the_start_of_epoch_20(
  max_decay_epoch, step, factor
):
  assert rate(step, max_decay_epoch=max_decay_epoch) == pytest.approx(factor * RATE)


def test_each_multiple_of_the_decay_interval_below_the_limit_decays():
  decays = [rate(e * STEPS_PER_EPOCH, decay_every_epochs=5, max_decay_epoch=16) for e in range(25)]
  expected = [RATE * 0.1 ** min(e // 5, 3) for e in range(25)]
  np.testing.assert_allclose(decays, expected, rtol=1e-5)


def test_warm_up_rises_linearly_to_the_full_rate():
  rates = [rate(step, warmup_steps=4) for step in range(6)]
  np.testing.assert_allclose(rates, RATE * np.array([0.25, 0.5, 0.75, 1, 1, 1]), rtol=1e-6)


def test_the_cosine_schedule_ends_at_zero():
  total = 50 * STEPS_PER_EPOCH
  assert rate(0, schedule="cosine") == pytest.approx(RATE)
  assert rate(total // 2, schedule="cosine") == pytest.approx(RATE / 2)
  assert rate(total, schedule="cosine") == pytest.approx(0.0, abs=1e-12)


def test_an_unknown_schedule_is_refused_by_name():
  with pytest.raises(ValueError, match="step.*cosine.*'linear'"):
    rate(0, schedule="linear")


PARAMS = {
  "head": {
    "fc": {"kernel": jnp.array([0.5, -2.0, 3.0])},
    "aggregation_fc": {"kernel": jnp.array([1.0, -1.0])},
  },
  "relation": {"fc": {"bias": jnp.array([0.25])}},
  "logit_scale": jnp.array([10.0]),
}
# The second gradient of the kernel is zero but present.
GRADS = {
  "head": {
    "fc": {"kernel": jnp.array([0.1, 0.0, -4.0])},
    "aggregation_fc": {"kernel": jnp.array([0.0, 0.0])},
  },
  "relation": {"fc": {"bias": jnp.array([0.0])}},
  "logit_scale": jnp.array([0.3]),
}


def train(config, steps: int, grads=GRADS, params=PARAMS):
  tx = CRN(config, vocab_size=1).optimizer(steps_per_epoch=10, total_steps=100)
  state = tx.init(params)
  for _ in range(steps):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


def adam(w, g, steps: int, rate: float, decay: float):
  """PyTorch's Adam with weight_decay, in float64."""
  w, m, v = np.asarray(w, np.float64), 0.0, 0.0
  for t in range(1, steps + 1):
    d = np.asarray(g, np.float64) + decay * w
    m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d * d
    w = w - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
  return w


def test_weight_decay_is_added_to_the_gradient_before_adam():
  """So that where the gradient is zero the decay alone moves a parameter at nearly full rate."""
  config = default.get_config()
  config.optimizer.update(learning_rate=0.01, weight_decay=1e-3)
  trained = train(config, steps=3)["head"]["fc"]["kernel"]
  kernel, grad = PARAMS["head"]["fc"]["kernel"], GRADS["head"]["fc"]["kernel"]
  np.testing.assert_allclose(trained, adam(kernel, grad, 3, 0.01, 1e-3), rtol=1e-6)
  assert trained[1] == pytest.approx(-2.0 + 3 * 0.01, abs=1e-4)


def test_parameters_that_no_loss_reaches_stay_as_they_are():
  """Weight decay included, as PyTorch skips parameters without a gradient."""
  released = default.get_config("crn_released")
  assert CRN(released, vocab_size=1).unused_parameters() == {"aggregation_fc", "relation"}
  trained = train(released, steps=3)
  assert (trained["head"]["aggregation_fc"]["kernel"] == jnp.array([1.0, -1.0])).all()
  assert trained["relation"]["fc"]["bias"] == 0.25
  assert (trained["head"]["fc"]["kernel"] != PARAMS["head"]["fc"]["kernel"]).all()


def test_in_preset_crn_every_parameter_is_trained():
  config = default.get_config()
  assert not CRN(config, vocab_size=1).unused_parameters()
  trained = train(config, steps=1)
  assert (trained["head"]["aggregation_fc"]["kernel"] != jnp.array([1.0, -1.0])).all()
  assert trained["relation"]["fc"]["bias"] != 0.25


def test_the_temperature_can_learn_faster():
  config = default.get_config()
  config.optimizer.update(learning_rate=0.01, weight_decay=0.0, logit_scale_rate=30.0)
  trained = train(config, steps=2)
  np.testing.assert_allclose(trained["logit_scale"], 10 - 2 * 30 * 0.01, rtol=1e-5)
  kernel, grad = PARAMS["head"]["fc"]["kernel"], GRADS["head"]["fc"]["kernel"]
  np.testing.assert_allclose(
    trained["head"]["fc"]["kernel"], adam(kernel, grad, 2, 0.01, 0.0), rtol=1e-6
  )


def test_gradients_are_clipped_before_the_decay_is_added():
  config = default.get_config()
  config.optimizer.update(learning_rate=0.01, weight_decay=1e-3, clip_norm=0.5)
  trained = train(config, steps=1)["head"]["fc"]["kernel"]
  norm = np.sqrt(0.1**2 + 4.0**2 + 0.3**2)
  grad = GRADS["head"]["fc"]["kernel"] * 0.5 / norm
  expected = adam(PARAMS["head"]["fc"]["kernel"], grad, 1, 0.01, 1e-3)
  np.testing.assert_allclose(trained, expected, rtol=1e-6)


def test_the_backbone_can_learn_slower():
  params = {**PARAMS, "backbone": {"block": {"fc": {"kernel": jnp.array([1.0])}}}}
  grads = {**GRADS, "backbone": {"block": {"fc": {"kernel": jnp.array([2.0])}}}}
  config = default.get_config()
  config.optimizer.update(learning_rate=0.01, weight_decay=0.0, backbone_rate=0.1)
  trained = train(config, 1, grads, params)
  np.testing.assert_allclose(trained["backbone"]["block"]["fc"]["kernel"], 1 - 0.001, rtol=1e-6)
  np.testing.assert_allclose(trained["relation"]["fc"]["bias"], 0.25, rtol=1e-6)
  np.testing.assert_allclose(trained["logit_scale"], 10 - 0.01, rtol=1e-6)


def test_by_default_all_rates_are_the_published_one_and_nothing_is_averaged():
  config = default.get_config().optimizer
  assert (config.backbone_rate, config.logit_scale_rate, config.ema_decay) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (1, 2 / 11), (10_000, 0.99)])
def test_the_average_forgets_its_start_and_then_keeps_its_decay(step, decay):
  average, params = {"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}
  new = optimizer.average_parameters(average, params, jnp.asarray(step), 0.99)
  np.testing.assert_allclose(new["w"], decay * 1.0 + (1 - decay) * 2.0, rtol=1e-6)


def test_decoupled_decay_is_pytorchs_adamw():
  config = default.get_config()
  config.optimizer.update(
    algorithm="adamw", learning_rate=0.01, weight_decay=0.1, betas=(0.8, 0.95), epsilon=1e-3
  )
  trained = train(config, steps=3)
  for trained_leaf, leaf, grad in zip(*map(jax.tree.leaves, (trained, PARAMS, GRADS)), strict=True):
    parameter = torch.tensor(np.array(leaf), dtype=torch.float64, requires_grad=True)
    adamw = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-3)
    for _ in range(3):
      parameter.grad = torch.tensor(np.array(grad), dtype=torch.float64)
      adamw.step()
    np.testing.assert_allclose(trained_leaf, parameter.detach().numpy(), rtol=1e-6)


def test_sgd_is_that_of_pytorch():
  config = default.get_config()
  config.optimizer.update(algorithm="sgd", momentum=0.8, learning_rate=0.01, weight_decay=0.1)
  trained = train(config, steps=3)
  for trained_leaf, leaf, grad in zip(*map(jax.tree.leaves, (trained, PARAMS, GRADS)), strict=True):
    parameter = torch.tensor(np.array(leaf), dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=0.01, weight_decay=0.1, momentum=0.8)
    for _ in range(3):
      parameter.grad = torch.tensor(np.array(grad), dtype=torch.float64)
      sgd.step()
    np.testing.assert_allclose(trained_leaf, parameter.detach().numpy(), rtol=1e-6)


def test_an_unknown_algorithm_is_refused_by_name():
  config = default.get_config()
  config.optimizer.algorithm = "lion"
  with pytest.raises(ValueError, match="adam.*adamw.*sgd.*'lion'"):
    train(config, steps=1)


@pytest.mark.parametrize("sizes", [(3,), (2**16,), (5, 2**16, 7, 2**17, 1)])
def test_the_norm_is_that_of_all_values(sizes):
  """To 1e-6: sums in float32, in another order."""
  rng = np.random.default_rng(0)
  tree = {str(i): rng.normal(size=size).astype(np.float32) for i, size in enumerate(sizes)}
  tree["0"] = tree["0"].reshape(1, -1)
  expected = np.linalg.norm(np.concatenate([x.ravel() for x in tree.values()]).astype(np.float64))
  np.testing.assert_allclose(jax.jit(optimizer.norm)(tree), expected, rtol=1e-6)
