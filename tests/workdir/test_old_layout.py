"""Checkpoints from before equal blocks were stacked are read, checked and continued.

They have one array a block and no number of a layout in their metadata (version 0.1).
"""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from crn_jax import state
from crn_jax.errors import UserError
from crn_jax.models.backbones import stacking
from crn_jax.workdir.checkpoint import CheckpointReader, Checkpoints, DamagedError, checksum
from tests import tiny_model as tiny

STEP = 3


@pytest.fixture(scope="module")
def written():
  """A state with a moving average and different moments everywhere, stacked, of numpy arrays."""
  c = tiny.config(depths=(1, 6))
  c.optimizer.ema_decay = 0.9
  method = tiny.model(c)
  rng = np.random.default_rng(0)
  like = state.abstract(method)
  values = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)
  return values.replace(step=np.asarray(STEP, np.int32)), like


def save_old(folder, value, metadata=None):
  """As version 0.1 did it."""
  if metadata is None:
    fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
    metadata = {"checksums": {k: checksum(v) for k, v in fields.items()}, "results": None}
  with ocp.CheckpointManager(folder) as manager:
    manager.save(STEP, args=ocp.args.StandardSave(value), custom_metadata=metadata)


def equal(a, b) -> bool:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_the_state_of_a_training_is_stacked(written):
  value, _ = written
  for tree in (value.params, value.opt_state, value.average):
    for part in ("local", "global"):
      names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree[part])]
      assert any("stage1_pairs" in name for name in names)
      assert not any("stage1_block" in name for name in names)


def test_parameters_moments_and_average_are_read_stacked(written, tmp_path):
  value, like = written
  save_old(tmp_path, stacking.unstack(value))
  with CheckpointReader(tmp_path) as checkpoints:
    assert equal(checkpoints.restore(STEP, like), value)
    fields = checkpoints.restore_fields(STEP, like, ("average", "batch_stats"))
  assert equal(fields["average"], value.average)
  assert equal(fields["batch_stats"], value.batch_stats)


def test_arrays_of_jax_are_read_by_who_writes_numpy(written, tmp_path):
  """As a converted release was written."""
  value, like = written
  save_old(tmp_path, jax.tree.map(jnp.asarray, stacking.unstack(value)))
  with Checkpoints(tmp_path) as checkpoints:
    assert equal(checkpoints.restore_last(like), value)


def test_one_checksum_for_all_is_read_too(written, tmp_path):
  """As written before fields had their own."""
  value, like = written
  old = stacking.unstack(value)
  save_old(tmp_path, old, {"checksum": checksum(old), "results": None})
  with CheckpointReader(tmp_path) as checkpoints:
    assert equal(checkpoints.restore(STEP, like), value)
    fields = checkpoints.restore_fields(STEP, like, ("params",))
  assert equal(fields["params"], value.params)


def test_damage_is_still_seen(written, tmp_path):
  value, like = written
  old = stacking.unstack(value)
  save_old(tmp_path, old, {"checksums": {"params": "00000000"}, "results": None})
  with CheckpointReader(tmp_path) as checkpoints, pytest.raises(DamagedError, match="params"):
    checkpoints.restore(STEP, like)


def test_a_run_goes_on_stacked(written, tmp_path):
  """The next checkpoint holds stacked arrays, and both are read."""
  value, like = written
  save_old(tmp_path, stacking.unstack(value))
  with Checkpoints(tmp_path) as checkpoints:
    restored = checkpoints.restore_last(like)
    checkpoints.save(restored.replace(step=np.asarray(STEP + 1, np.int32)))
    checkpoints.require(STEP + 1)
    assert equal(checkpoints.restore(STEP + 1, like).params, value.params)
    assert equal(checkpoints.restore(STEP, like), value)


def test_another_structure_is_named_as_it_was_written(written, tmp_path):
  value, _ = written
  save_old(tmp_path, stacking.unstack(value))
  other = state.abstract(tiny.model(tiny.config(depths=(1, 4))))
  with CheckpointReader(tmp_path) as checkpoints, pytest.raises(UserError) as error:
    checkpoints.restore_fields(STEP, other, ("params",))
  assert "params.global.backbone.stage1_block4" in str(error.value)
  assert "absent expected" in str(error.value)


def test_a_newer_layout_is_refused(written, tmp_path):
  value, like = written
  save_old(tmp_path, value, {"checksums": {}, "results": None, "layout": 2})
  with CheckpointReader(tmp_path) as checkpoints, pytest.raises(UserError, match="layout 2"):
    checkpoints.restore(STEP, like)
