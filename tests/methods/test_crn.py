"""Behaviour of one training update, on a tiny model (numbers: test_train_parity)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crn_jax import parallel
from crn_jax.methods import losses
from crn_jax.methods.base import TrainState
from crn_jax.methods.crn import join
from crn_jax.models import crn
from crn_jax.models.crn import BranchOutput
from crn_jax.models.preprocessing import IMAGENET
from tests import tiny_model as tiny

pytestmark = pytest.mark.usefixtures("quick_compile")

BATCH = 4
TX = optax.sgd(0.1)


def config(
  names="crn", *, update_mode="alternating", dtype="float32", auxiliary=None, drop_path=None
):
  c = tiny.config(names)
  if drop_path is not None:
    c.model.backbone.drop_path_rate = drop_path
  c.update_mode = update_mode
  c.model.dtype = dtype
  if auxiliary is not None:
    c.loss.auxiliary = auxiliary
  return c


@functools.cache
def compiled_step(names="crn", **changes):
  c = config(names, **changes)
  # On a CPU XLA would leave out rounding to bfloat16 between two operations.
  return jax.jit(
    functools.partial(tiny.model(c).train_step, TX),
    compiler_options={"xla_allow_excess_precision": False},
  )


@functools.cache
def start(names="crn") -> TrainState:
  return tiny.state(config(names), TX)


@functools.cache
def first_update(names="crn", **changes):
  """State and metrics after the first step."""
  step = compiled_step(names, **changes)
  return jax.device_get(step(start(names), tiny.batch(config(names), BATCH)))


def equal(a, b) -> bool:
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shard_map", "pmap"])
def test_the_update_compiles_once(mode):
  """Over steps whose state comes from the host and from the step before, on several devices."""
  c = config()
  dp = parallel.DataParallel.create(mode, jax.devices()[:2])
  step = dp.map(
    functools.partial(tiny.model(c, parallel.AXIS).train_step, TX),
    outputs=(parallel.REPLICATED, parallel.REPLICATED),
    donate_first=True,
  )
  state = dp.replicate(jax.tree.map(np.asarray, start()))
  state, _ = step(state, dp.shard(tiny.batch(c, BATCH)))
  compilations = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
  )
  for i in range(2):
    state, _ = step(state, dp.shard(tiny.batch(c, BATCH, seed=i)))
  state = dp.replicate(dp.fetch(state))
  state, _ = step(state, dp.shard(tiny.batch(c, BATCH)))
  assert dp.fetch(state).step == 4
  assert not compilations
  jax.jit(lambda x: x + BATCH)(np.float32(1))
  assert compilations  # It would have been heard of.


@pytest.mark.parametrize(
  ("update_mode", "auxiliary", "expected"),
  [
    ("alternating", 0.0, 6 * BATCH),
    ("alternating", 1.0, 6 * BATCH),
    ("simultaneous", 0.0, 4 * BATCH),
    ("simultaneous", 1.0, 4 * BATCH),
  ],
)
@pytest.mark.parametrize(("names", "zero_images"), [("crn", 2), ("crn,resnet50", 1)])
def test_each_image_passes_a_backbone_as_often_as_needed(
  names, zero_images, update_mode, auxiliary, expected
):
  """Reference and target, in both branches and, alternating, in the updated local branch again.

  The auxiliary relation adds a zero image a branch, or two of them to a batch, which stays even.
  """
  c = config(names, update_mode=update_mode, auxiliary=auxiliary)
  state, passed = start(names), []

  def count(next_method, args, kwargs, context):
    if context.module.name == "backbone" and context.method_name == "__call__":
      passed.append(args[0].shape[0])
    return next_method(*args, **kwargs)

  step = functools.partial(tiny.model(c).train_step, TX)
  with nn.intercept_methods(count):
    jax.eval_shape(step, state, tiny.batch(c, BATCH))
  assert sum(passed) == expected + (2 * zero_images if auxiliary else 0)
  if auxiliary and c.model.backbone.name == "resnet50":
    # The zero image comes first: it takes the running statistics from before the step.
    assert passed[:2] == [1, 2 * BATCH]
  else:
    # Where pictures do not depend on each other it is in the batch.
    assert passed[:2] == [2 * BATCH + (zero_images if auxiliary else 0)] * 2


@pytest.mark.slow
def test_both_update_modes_change_local_alike_and_global_otherwise():
  """Alternating, the global branch learns from the local branch that was updated already."""
  (alternating, metrics), (simultaneous, other) = (
    first_update(update_mode=mode) for mode in ("alternating", "simultaneous")
  )
  for a, b in zip(
    jax.tree.leaves(alternating.params["local"]), jax.tree.leaves(simultaneous.params["local"]),
    strict=True,
  ):  # fmt: skip
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  moved = abs(metrics["global/mutual_kl"] / other["global/mutual_kl"] - 1)
  assert moved > 1e-3
  # What has no teacher in it is the same.
  assert metrics["global/classification"] == pytest.approx(other["global/classification"], rel=1e-5)
  assert not equal(alternating.params["global"], simultaneous.params["global"])


def test_an_unknown_update_mode_is_refused_by_name():
  with pytest.raises(ValueError, match="alternating.*simultaneous.*'joint'"):
    tiny.model(config(update_mode="joint"))


@pytest.mark.slow
def test_the_first_gradient_is_finite():
  """The auxiliary relation's zero image makes LayerNorm, GeM and cosines degenerate."""
  c = config()
  fresh = TrainState.create(tiny.fresh_variables(c), TX)
  state, metrics = compiled_step()(fresh, tiny.batch(c, BATCH))
  assert metrics["local/auxiliary"] > 0
  for name, value in metrics.items():
    assert np.isfinite(value), name
  for path, value in jax.tree_util.tree_leaves_with_path(state.params):
    assert np.isfinite(value).all(), path


@pytest.mark.slow
# 14 BatchNorms in two Inception units, 9 in this ResNet, with a mean and a variance each.
@pytest.mark.parametrize(
  ("names", "drop_path", "arrays"),
  [("crn", 0.0, 28), ("crn,resnet50", None, 28 + 18), ("clvc_net", None, 28 + 18)],
)
def test_running_statistics_are_moved_once_by_the_pass_with_gradients(names, drop_path, arrays):
  """Neither the zero image nor the updated local branch's pass as a teacher moves them."""
  state, metrics = first_update(names, drop_path=drop_path)
  assert all(np.isfinite(value) for value in metrics.values())
  c = config(names, drop_path=drop_path)
  batch = tiny.batch(c, BATCH)
  before = start(names)
  for name in crn.BRANCHES:
    _, updated = tiny.model(c).branches[name].apply(
      {'params': before.params[name], 'batch_stats': before.batch_stats[name]},
      IMAGENET.normalize(batch['reference']), IMAGENET.normalize(batch['target']),
      batch['tokens'], jnp.asarray(batch['token_mask']), train=True, modification=False,
      auxiliary=False, mutable=['batch_stats'],
    )  # fmt: skip
    got, expected = state.batch_stats[name], updated["batch_stats"]
    assert len(jax.tree.leaves(got)) == arrays
    assert not equal(got, before.batch_stats[name])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("names", ["crn,resnet50", "clvc_net"])
def test_every_parameter_of_a_resnet_is_trained(names):
  """Gradients reach all of it; without the relations, their module alone stays as it was."""
  state, _ = first_update(names, drop_path=None)
  moved = jax.tree.map(
    lambda a, b: bool((a != b.astype(np.float32)).any()), state.params, start(names).params
  )
  for path, value in jax.tree_util.tree_leaves_with_path(moved):
    name = jax.tree_util.keystr(path)
    assert value == (names != "clvc_net" or "relation" not in name), name


@pytest.mark.slow
def test_an_update_is_a_function_of_seed_and_step():
  """Stochastic depth draws anew each step, and the same when a run repeats a step."""
  step, batch = compiled_step(), tiny.batch(config(), BATCH)
  first, metrics = step(start(), batch)
  again, _ = step(start(), batch)
  later, later_metrics = step(start().replace(step=jnp.int32(1)), batch)
  assert equal(first, again)
  assert metrics["local/total"] != later_metrics["local/total"]
  assert metrics["global/total"] != later_metrics["global/total"]
  assert later.step == 2


@pytest.mark.slow
def test_without_stochastic_depth_nothing_is_random():
  step, batch = compiled_step(drop_path=0.0), tiny.batch(config(), BATCH)
  first, _ = step(start(), batch)
  later, _ = step(start().replace(step=jnp.int32(1)), batch)
  assert equal(first.params, later.params)


@pytest.mark.slow
def test_bfloat16_computes_the_same_losses_roughly():
  """bfloat16 has 8 bits: 5 % on each term, or 0.01 where a term is small.

  The mutual KL is a small difference of rankings. Cosines may be off by 0.01, so its logits by 0.1,
  and the KL by 0.1 times the L1 distance of the two rankings, at most sqrt(2 KL) (Pinsker).
  """
  state, metrics = first_update(dtype="bfloat16")
  _, expected = first_update(dtype="float32")
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
  for name, value in expected.items():
    if not name.endswith("grad_norm"):
      small = 0.1 * float(np.sqrt(2 * value)) if name.endswith("mutual_kl") else 0.01
      assert metrics[name] == pytest.approx(value, rel=0.05, abs=small), name
  apart = [abs(metrics[name] / value - 1) for name, value in expected.items()]
  assert max(apart) > 1e-3  # It was computed in bfloat16.
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


class TestJoin:
  def test_each_branch_has_half_of_the_weight(self):
    joined = join(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 1e-3]]))
    np.testing.assert_allclose(joined, np.array([[0.6, 0.8, 0.0, 1.0]]) / np.sqrt(2), rtol=1e-6)

  def test_widths_may_differ(self):
    assert join(jnp.ones((2, 3)), jnp.ones((2, 5))).shape == (2, 8)

  def test_zero_vectors_stay_finite(self):
    assert not join(jnp.zeros((1, 2)), jnp.zeros((1, 2))).any()

  def test_half_precision_is_normalised_in_float32(self):
    joined = join(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((1, 2), jnp.bfloat16))
    assert joined.dtype == jnp.float32


@pytest.mark.parametrize("update_mode", ["alternating", "simultaneous"])
def test_terms_without_a_weight_cost_nothing_and_are_not_there(update_mode):
  """Neither the teacher's pass, nor an infinite value that times zero would be NaN."""
  c = config(update_mode=update_mode, auxiliary=0.0)
  c.loss.update(cross_branch=0.0, mutual_kl=0.0)
  state, passed = start(), []

  def count(next_method, args, kwargs, context):
    if context.module.name == "backbone" and context.method_name == "__call__":
      passed.append(args[0].shape[0])
    return next_method(*args, **kwargs)

  with nn.intercept_methods(count):
    _, metrics = jax.eval_shape(
      functools.partial(tiny.model(c).train_step, TX), state, tiny.batch(c, BATCH)
    )
  assert sum(passed) == 4 * BATCH
  assert not {"local/cross_branch", "global/mutual_kl", "local/auxiliary"} & metrics.keys()
  assert {"local/perceptual", "global/classification", "global/total"} <= metrics.keys()


def test_an_infinite_term_without_a_weight_does_not_spoil_the_loss():
  out = BranchOutput(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones(1))
  teacher = out.replace(query_vector=jnp.full((2, 3), jnp.inf))
  weights = config().loss
  weights.update(cross_branch=0.0, mutual_kl=0.0)
  total, terms = losses.branch_losses(out, teacher, weights, losses.Batch())
  assert np.isfinite(total)
  assert set(terms) == {"classification"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_the_zero_image_rides_along_without_changing_a_number(kind):
  """Its vectors are those of a pass of its own, without stochastic depth; so are the pictures'.

  Bound: 1e-5 of the largest value; the shapes of the products differ, hence the order of sums.
  """
  c = config(drop_path=0.5)
  branch, batch = tiny.model(c).branches[kind], tiny.batch(c, BATCH)
  variables = {name: tree[kind] for name, tree in tiny.variables(c).items()}
  inputs = [IMAGENET.normalize(batch[k]) for k in ("reference", "target")]
  inputs += [batch["tokens"], jnp.asarray(batch["token_mask"])]

  def apply(*args, **kwargs):
    return branch.apply(variables, *args, rngs={"drop_path": jax.random.key(1)}, **kwargs)

  @functools.partial(jax.jit, static_argnames="auxiliary")
  def run(auxiliary):
    return apply(*inputs, train=True, modification=False, auxiliary=auxiliary,
                 mutable=["batch_stats"])[0]  # fmt: skip

  @jax.jit
  def alone():
    zero = apply(32, 32, method=crn.Branch.encode_zero_image)
    words = apply(*inputs[2:], method=crn.Branch.encode_text)
    return apply(zero.map, *words, train=True, method=crn.Branch.compose_zero_image)

  out, without = run(auxiliary=True), run(auxiliary=False)
  for got, expected in (
    (out.auxiliary_vector, alone()),
    (out.query_vector, without.query_vector),
    (out.target_vector, without.target_vector),
  ):
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
