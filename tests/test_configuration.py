"""Every field has a rule, what is published passes, and what is wrong is said before any work."""

import itertools
import math
import pathlib
import re

import jax
import numpy as np
import pytest

from configs import default
from crn_jax import configuration, train
from crn_jax.errors import UserError
from crn_jax.input_pipeline import registry
from crn_jax.methods import optimizer
from crn_jax.methods.base import Method
from crn_jax.methods.crn import CRN
from crn_jax.parallel import DataParallel
from crn_jax.workdir import run
from tests import tiny, tiny_model

MINI = pathlib.Path(__file__).parent / "goldens" / "mini_data"


def changed(fields: dict, names: str = ""):
  """The tiny configuration with other values, of any type."""
  config = tiny.config("nowhere", names or "crn")
  with config.ignore_type():
    for name, value in fields.items():
      *groups, field = name.split(".")
      holder = config
      for group in groups:
        holder = holder[group]
      holder[field] = value
  return config


def complaints(config, **devices) -> list[str]:
  """The lines of the message, one a fault."""
  with pytest.raises(UserError) as error:
    configuration.check(config, **devices)
  first, *lines, last = str(error.value).splitlines()
  assert "cannot be used" in first
  assert "--config.FIELD=VALUE" in last
  return [line.strip() for line in lines]


def test_every_field_has_a_rule_and_every_rule_a_field():
  assert set(run.flat(default.get_config().to_dict())) == set(configuration.RULES)


@pytest.mark.parametrize("name", configuration.RULES)
def test_every_rule_refuses_what_is_of_another_type(name):
  for value in (object, b"a", math.nan, (object,)):
    (line,) = complaints(changed({name: value}))
    assert line.startswith(f"{name} = {value!r}: expected ")


@pytest.mark.parametrize("name", configuration.RULES)
def test_a_truth_value_is_no_number(name):
  rule = configuration.RULES[name]
  assert rule.holds(True) == (rule is configuration.TRUTH)


# Field -> values that would fail later, or mean nothing.
WRONG = {
  "name": [""],
  "method": ["sun"],
  "seed": [-1, 2**32, 1.5],
  "num_epochs": [0, -1, 2.0],
  "batch_size": [0, -16],
  "update_mode": ["both"],
  "data.dataset": ["fashionIQ"],
  "data.root": [""],
  "data.category": ["skirt"],
  "data.on_missing": ["ignore"],
  "data.captions": ["first"],
  "data.shoes_pairs": ["all"],
  "data.max_words": [2],
  "data.image_size": [0],
  "data.resize": [-1],
  "data.max_ratio": [0.9, math.inf],
  "data.augment": ["crop"],
  "data.markers": ["none"],
  "model.backbone.name": ["swin_huge"],
  "model.backbone.depths": [(), (0, 1), (1.0, 1), 3],
  "model.backbone.num_heads": [(), ("a", 1)],
  "model.backbone.embed_dim": [0],
  "model.backbone.patch_size": [0],
  "model.backbone.window_size": [0],
  "model.backbone.drop_path_rate": [-0.1, 1.0, math.nan],
  "model.backbone.mean": [(0.5, 0.5), (0.5, 0.5, math.inf)],
  "model.backbone.std": [(0.5, 0.5, 0.0)],
  "model.backbone.interpolation": ["nearest"],
  "model.map_dim": [0],
  "model.feature_dim": [0],
  "model.word_dim": [0],
  "model.composition": ["sum"],
  "model.text_encoder": ["gpt"],
  "model.aggregation": ["unused"],
  "model.attention_temperature.local": [0.0, -1.0],
  "model.attention_temperature.global": [math.inf],
  "model.dtype": ["float16", "float64"],
  "loss.classification": [-1.0, math.nan],
  "loss.perceptual": [-0.1],
  "optimizer.learning_rate": [-1e-3, 0.0, math.nan, math.inf],
  "optimizer.algorithm": ["lion"],
  "optimizer.momentum": [1.0],
  "optimizer.weight_decay": [-1e-6],
  "optimizer.betas": [(0.9,), (0.9, 1.0), 0.9],
  "optimizer.epsilon": [0.0],
  "optimizer.schedule": ["linear"],
  "optimizer.decay_every_epochs": [0],
  "optimizer.decay_factor": [0.0],
  "optimizer.max_decay_epoch": [-1],
  "optimizer.warmup_steps": [-1],
  "optimizer.clip_norm": [-1.0],
  "optimizer.logit_scale_rate": [-1.0],
  "optimizer.backbone_rate": [-1.0],
  "optimizer.ema_decay": [1.0, -0.5],
  "parallel.mode": ["pjit"],
  "eval.batch_size": [0],
  "eval.every_epochs": [0, -1],
  "eval.recall_at": [(), (0,), (1, 10, 10), (10, 1.5), 10],
  "eval.best_metric": ["R@10", "", "val_split/", "/R@10"],
  "log_every_steps": [0],
  "checkpoint_every_steps": [-5, 0],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_value_out_of_range_is_refused_with_what_was_expected(name, value):
  (line,) = complaints(changed({name: value}))
  assert line == f"{name} = {value!r}: expected {configuration.RULES[name].expected}"


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"data.resize": 31}, "data.resize = 31, data.image_size = 32: expected a short side"),
    (
      {"model.backbone.patch_size": 5},
      "data.image_size = 32, .*: expected a multiple of the patch",
    ),
    ({"model.backbone.depths": (1,)}, "expected both of the same number of stages"),
    ({"model.backbone.num_heads": (1, 5)}, r"expected the stages' widths, \[16, 32\], to be mult"),
    ({"model.feature_dim": 48}, "model.feature_dim = 48: expected a multiple of 32"),
    ({"model.map_dim": 24}, "model.map_dim = 24: expected a multiple of 16"),
    # The backbone's own width, if there is no other.
    (
      {"model.map_dim": None, "model.backbone.embed_dim": 12},
      "model.map_dim = 24: expected a multiple of 16",
    ),
    ({"eval.best_metric": "test_images/R@10"}, "a protocol of fashioniq .*: val_split or orig"),
    ({"data.dataset": "shoes"}, "a protocol of shoes before the slash: eval_list"),
    ({"eval.best_metric": "val_split/R@7"}, "expected R@1 or R@10 behind the slash"),
    ({"model.backbone.width": 16}, "width = 16: expected None, as swin_large has no such size"),
    (
      dict.fromkeys([f"loss.{t}" for t in default.get_config().loss if t != "perceptual"], 0.0),
      "loss.classification = 0.0, .*: expected one of them above 0",
    ),
    ({"model.composition": "tirg"}, "model.composition = 'tirg': expected None, as the method is"),
    ({"loss.triplet": 1.0}, "loss.triplet = 1.0: expected 0, as the method is 'crn'"),
    ({"loss.joint": 0.5}, "loss.joint = 0.5: expected 0, as the method is 'crn'"),
    ({"model.text_encoder": "bigru"}, "text_encoder = 'bigru': expected 'lstm', as the method is"),
  ],
)
def test_fields_that_do_not_agree_are_refused(fields, expected):
  (line,) = complaints(changed(fields))
  assert re.search(expected, line), line


@pytest.mark.parametrize(
  ("names", "fields", "expected"),
  [
    ("tirg", {"loss.auxiliary": 0.5}, "loss.auxiliary = 0.5: expected 0, as it is a loss of CRN"),
    ("tirg", {"loss.classification": 0.0}, "expected one of them above 0"),
    ("tirg", {"model.composition": None}, "model.composition = None: expected one of 'imag"),
    ("tirg", {"loss.correction": 1.0}, "loss.correction = 1.0: expected 0, as model.composition ="),
    (
      "tirg",
      {"model.text_encoder": "bigru", "model.feature_dim": 31},
      "text_encoder = 'bigru', model.feature_dim = 31: expected an even model.feature_dim",
    ),
    (
      "film,swin_tiny",
      {},
      "'film', model.backbone.name = 'swin_tiny': expected one of .*resnet",
    ),
  ],
)
def test_fields_of_a_single_branch_that_do_not_agree_are_refused(names, fields, expected):
  config = default.get_config(names)
  config.update_from_flattened_dict(fields)
  (line,) = complaints(config)
  assert re.search(expected, line), line


def test_batches_that_devices_cannot_share_are_refused():
  config = changed({"eval.batch_size": 20})
  configuration.check(config)
  configuration.check(config, train_devices=8)
  assert complaints(config, train_devices=3, eval_devices=8) == [
    "batch_size = 16: expected a multiple of the number of devices, 3",
    "eval.batch_size = 20: expected a multiple of the number of devices, 8",
  ]


def test_everything_that_is_wrong_is_said_at_once():
  wrong = {name: values[0] for name, values in WRONG.items()}
  lines = complaints(changed(wrong))
  assert sorted(line.partition(" = ")[0] for line in lines) == sorted(wrong)


def test_a_misspelt_or_missing_field_of_a_file_is_named():
  config = changed({"data.image_sise": 64, "rooot": "x"})
  del config.loss.auxiliary
  assert complaints(config) == [
    "data.image_sise = 64: no such field; did you mean data.image_size?",
    "rooot = 'x': no such field; did you mean data.root?",
    "loss.auxiliary: is missing; expected a number of 0 or more",
  ]


class TestAgainstTheModules:
  """Choices and sizes are what the modules take: neither fewer nor more."""

  @pytest.mark.parametrize("dataset", ["fashioniq", "shoes", "fashion200k"])
  def test_protocols(self, dataset):
    config = default.get_config()
    config.data.update(dataset=dataset, root=str(MINI / dataset), on_missing="skip")
    for split in registry.open_dataset(config.data, train=False).evals:
      assert tuple(split.galleries) == configuration.protocols(dataset)

  def test_choices_without_a_table(self):
    for mode in configuration.RULES["parallel.mode"].names:
      DataParallel.create(mode)
    for mode in configuration.RULES["update_mode"].names:
      CRN(changed({"update_mode": mode}), 3)
    for name in configuration.RULES["optimizer.schedule"].names:
      optimizer.learning_rate(changed({"optimizer.schedule": name}).optimizer, 1, 1)
    for name in configuration.RULES["model.dtype"].names:
      assert jax.numpy.dtype(name)

  @pytest.mark.parametrize("aggregation", configuration.RULES["model.aggregation"].names)
  @pytest.mark.parametrize("names", ["crn", "resnet50", "clvc_net", "clvc_net,swin_base"])
  def test_what_passes_can_be_built(self, names, aggregation):
    config = tiny_model.config(names)
    config.model.aggregation = aggregation
    config.model.feature_dim = 32
    configuration.check(config)
    jax.eval_shape(lambda: CRN(config, 3).init(jax.random.key(0)))

  @pytest.mark.parametrize(
    "fields",
    [
      {"model.backbone.patch_size": 5},
      {"model.backbone.depths": (1,)},
      {"model.backbone.num_heads": (1, 5)},
      {"model.feature_dim": 48},
      {"model.feature_dim": 16},
      {"model.map_dim": 24},
      {"model.map_dim": None, "model.backbone.embed_dim": 12},
      {"model.backbone.width": 16},
      {"data.image_size": 0},
    ],
  )
  def test_what_is_refused_cannot_be_built(self, fields):
    config = changed(fields)
    assert complaints(config)
    with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
      jax.eval_shape(lambda: CRN(config, 3).init(jax.random.key(0)))

  def test_seeds(self):
    high = configuration.integer(0, 2**32 - 1)
    assert configuration.RULES["seed"].expected == high.expected
    for seed in (0, 2**32 - 1):
      np.random.default_rng([seed])
      assert int(jax.random.key_data(jax.random.key(seed))[-1]) == seed


@pytest.mark.parametrize("start", ["train", "evaluate"])
@pytest.mark.parametrize(("name", "value"), [("eval.recall_at", ()), ("eval.best_metric", "a/b")])
def test_nothing_is_read_or_written_before(start, name, value, monkeypatch, tmp_path):
  monkeypatch.setattr(train, "open_dataset", lambda *_, **__: pytest.fail("data were read"))
  monkeypatch.setattr(run, "check_trained", lambda *_: pytest.fail("the run was read"))
  config = changed({name: value})
  with pytest.raises(UserError, match=name):
    if start == "train":
      train.train(config, tmp_path / "run")
    else:
      train.evaluate_run(config, tmp_path / "run", "best")
  assert not list(tmp_path.iterdir())


def test_a_run_trained_on_other_devices_can_be_evaluated(tmp_path):
  """Its batch need not fit these devices: eight here."""
  with pytest.raises(UserError, match="holds no trained run"):
    train.evaluate_run(changed({"batch_size": 12}), tmp_path, "best")
  with pytest.raises(UserError, match="batch_size = 12: expected a multiple of .* devices, 8"):
    train.train(changed({"batch_size": 12}), tmp_path / "run")


def test_home_folders_are_expanded(monkeypatch):
  monkeypatch.setenv("HOME", "/home/somebody")
  config = default.get_config()
  before = config.to_dict()
  configuration.expand_paths(config)
  assert config.to_dict() == before
  config.model.backbone.name = "resnet50"
  assert config.model.pretrained == "weights/resnet50"  # Still follows.
  config.data.root, config.data.prepared, config.model.pretrained = "~/a", "~", "~/b/c"
  configuration.expand_paths(config)
  assert (config.data.root, config.data.prepared) == ("/home/somebody/a", "/home/somebody")
  assert config.model.pretrained == "/home/somebody/b/c"


def test_a_new_method_or_data_set_is_a_choice_at_once(monkeypatch):
  monkeypatch.setitem(configuration.METHODS, "sum", Method)
  # The sizes that CRN's units want are not wanted of others.
  configuration.check(changed({"method": "sum", "model.feature_dim": 17}))


def test_rules_and_agreements_name_fields():
  agreements = itertools.chain(
    configuration.AGREEMENTS, configuration.BACKBONE_AGREEMENTS, configuration.CRN_AGREEMENTS
  )
  named = {field for agreement in agreements for field in agreement.fields}
  assert named | set(configuration.PATHS) <= set(configuration.RULES)
