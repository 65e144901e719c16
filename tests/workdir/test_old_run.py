"""A run and converted weights of an earlier version are continued, evaluated and exported.

tests/goldens/old_run.tar.xz was written by version 0.1.0 (commit c521260): a run of `config`
stopped after the first of two epochs, the backbone it began from, and what that version then made
of them.
"""

import hashlib
import json
import pathlib
import shutil
import tarfile

import numpy as np
import pytest
import safetensors.numpy

from crn_jax import state, train
from crn_jax.convert import whole
from crn_jax.methods.crn import CRN
from crn_jax.workdir import history, weights
from tests import tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "old_run.tar.xz"
# Sums are taken in another order: the auxiliary relation's zero image now rides in the batch, and
# there are eight devices here. On the same processor that changes the losses of the fourth step by
# up to 4e-6; other processors may by more.
LOSS_TOLERANCE = 1e-4

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


@pytest.fixture(scope="module")
def old(tmp_path_factory):
  """Folder of the run, of the weights, of the data; and what is expected."""
  folder = tmp_path_factory.mktemp("old")
  with tarfile.open(GOLDEN) as archive:
    archive.extractall(folder, filter="data")
  tiny.draw(folder)
  return folder, json.loads((folder / "expected.json").read_text())


def config(folder, epochs: int):
  c = tiny.config(folder / "data")
  c.model.backbone.update(embed_dim=8, depths=(1, 2), num_heads=(1, 2), patch_size=4, window_size=2)
  c.model.update(map_dim=16, feature_dim=32, word_dim=8, pretrained="weights")
  c.num_epochs = epochs
  c.log_every_steps = 1
  return c


def copied(folder, tmp_path):
  return pathlib.Path(shutil.copytree(folder / "run", tmp_path / "run"))


def test_it_is_evaluated(old, tmp_path):
  folder, expected = old
  workdir = copied(folder, tmp_path)
  train.evaluate_run(config(folder, 1), workdir, "last")
  found = json.loads((workdir / "eval.json").read_text())
  # That version knew two protocols; what it said of them is what is said today.
  assert found["protocols"].pop("original_with_reference")["reference"] == "kept"
  assert found == expected["evaluated"]


def test_it_is_continued(old, tmp_path):
  folder, expected = old
  workdir = copied(folder, tmp_path)
  train.train(config(folder, 2), workdir)
  record = history.read(workdir).records[-1]
  assert record["step"] == 4
  for name, value in expected["continued"]["losses"].items():
    assert record[name] == pytest.approx(value, rel=LOSS_TOLERANCE), name
  results = json.loads((workdir / "eval.json").read_text())
  assert results.keys() == expected["continued"]["results"].keys()
  assert results["beside"] == expected["continued"]["results"]["beside"]


def test_it_is_exported_bit_by_bit(old, tmp_path):
  folder, expected = old
  whole.export(folder / "run", tmp_path / "out")
  for kind, digest in expected["exported"].items():
    tensors = safetensors.numpy.load_file(tmp_path / "out" / f"{kind}_model.safetensors")
    found = {
      name: hashlib.sha256(np.ascontiguousarray(tensors[name]).tobytes()).hexdigest()[:16]
      for name in sorted(tensors)
    }
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest() == digest


def test_its_weights_are_loaded(old):
  """They are those that the run began from: after two small steps they have hardly moved."""
  folder, _ = old
  c = config(folder, 1)
  c.model.pretrained = str(folder / "weights")
  state.check_pretrained(c)
  like = state.abstract(CRN(c, 69))
  for part in ("local", "global"):
    loaded = weights.load_backbone(folder / "weights", {"params": like.params[part]["backbone"]})
    assert np.isfinite(loaded["params"]["patch_embed"]["kernel"]).all()
