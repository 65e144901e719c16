"""The composition of docs/methods.md is added, trained and evaluated as it stands there."""

import json
import pathlib
import re
import sys
import types

import pytest

import crn_jax
from crn_jax import configuration, train
from crn_jax.models.composition import registry
from tests import tiny

DOCS = pathlib.Path(crn_jax.__file__).parents[1] / "docs" / "methods.md"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]


def test_it_is_trained_and_evaluated(monkeypatch, tmp_path):
  (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
  assert code.count("\n") <= 50
  module = types.ModuleType("composition_of_the_docs")
  monkeypatch.setitem(sys.modules, module.__name__, module)
  exec(compile(code, str(DOCS), "exec"), module.__dict__)
  monkeypatch.setitem(registry.COMPOSITIONS, "attended", module.Attended)
  config = tiny.config(tiny.draw(tmp_path), "tirg,equal,resnet18")
  config.model.composition = "attended"
  config.num_epochs = 1
  configuration.check(config)
  train.train(config, tmp_path / "run")
  results = json.loads((tmp_path / "run" / "eval.json").read_text())
  assert results["checkpoint_step"] == 2
