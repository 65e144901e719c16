"""The method of docs/extending.md is added, trained, continued and evaluated as it stands there."""

import json
import pathlib
import re
import sys
import types

import pytest

import crn_jax
from crn_jax import train
from crn_jax.errors import UserError
from crn_jax.methods import registry
from crn_jax.workdir import history
from tests import tiny

DOCS = pathlib.Path(crn_jax.__file__).parents[1] / "docs" / "extending.md"

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def added(monkeypatch):
  """Its class, under the name "sum"."""
  text = DOCS.read_text(encoding="utf-8").partition("## A new method")[2].partition("\n## ")[0]
  (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  module = types.ModuleType("method_of_the_docs")
  monkeypatch.setitem(sys.modules, module.__name__, module)
  exec(compile(code, str(DOCS), "exec"), module.__dict__)
  monkeypatch.setitem(registry.METHODS, "sum", module.Sum)


@pytest.mark.slow
def test_it_is_trained_continued_and_evaluated(added, tmp_path):
  config = tiny.config(tiny.draw(tmp_path))
  config.method = "sum"
  config.num_epochs = 1
  train.train(config, tmp_path / "run")
  config.num_epochs = 2
  train.train(config, tmp_path / "run")
  totals = history.read(tmp_path / "run").series("train/sum/total")
  assert totals[0].tolist() == [2, 4]
  results = json.loads((tmp_path / "run" / "eval.json").read_text())
  assert results["checkpoint_step"] == 4
  names = {p.name for p in (tmp_path / "run" / "pictures").iterdir()}
  assert {"recall_curve.png", "loss_curves.png", "retrieval_dress.png"} <= names
  assert not any(name.startswith("attention") for name in names)


def test_an_unknown_method_is_refused_with_the_choices():
  config = tiny.config("nowhere")
  config.method = "sun"
  with pytest.raises(UserError, match="method: unknown 'sun'; choose one of crn"):
    registry.create(config, vocab_size=3)
