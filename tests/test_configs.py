"""Configurations: presets and backbones after the colon, their names, their values."""

import importlib
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
import torch
from absl import flags

from configs import default, presets, zero_shot
from configs import run as saved
from crn_jax import configuration, pretrained, stages
from crn_jax.convert import release
from crn_jax.methods import registry as methods
from crn_jax.models.backbones import registry
from crn_jax.workdir import run
from tests import tiny_towers, torch_cpu  # noqa: F401 (before timm, which imports torchvision)

import timm as timm_models  # isort: skip

# Published ones; `run` is that of a run that is there, the others are of pretrained towers.
CONFIGS = sorted(
  {p.stem for p in pathlib.Path(default.__file__).parent.glob("*.py")}
  - {"run", "zero_shot", "crn_towers", "presets"}
)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("names", ["", "clvc_net", "swin_base", "crn_released,swin_tiny"])
def test_every_configuration_takes_a_preset_a_backbone_or_both(name, names):
  config = importlib.import_module(f"configs.{name}").get_config(names)
  assert (config.preset, config.model.backbone.name) == {
    "": ("crn", "swin_large"),
    "clvc_net": ("clvc_net", "resnet50"),
    "swin_base": ("crn_swin_base", "swin_base"),
    "crn_released,swin_tiny": ("crn_released_swin_tiny", "swin_tiny"),
  }[names]
  registry.create(config.model.backbone)
  if name != "default":
    assert config.name == f"{name}_{config.preset}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_can_be_used(name):
  get_config = importlib.import_module(f"configs.{name}").get_config
  for preset, backbone in itertools.product(presets.PRESETS, registry.BACKBONES):
    if preset not in presets.TOWER_PRESETS and (preset != "film" or "resnet" in backbone):
      configuration.check(get_config(f"{preset},{backbone}"))
      configuration.check(get_config(f"{preset},{backbone},equal"))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("names", ["", "clvc_net", "crn_released,swin_tiny"])
def test_a_runs_configuration_is_read_back_with_its_types(name, names, tmp_path):
  config = importlib.import_module(f"configs.{name}").get_config(names)
  config.model.backbone.mean = (0.5, 0.5, 0.5)
  run.save_config(config, tmp_path)
  found = saved.get_config(str(tmp_path))
  assert found.to_dict() == config.to_dict()
  types = [{k: type(v) for k, v in run.flat(c.to_dict()).items()} for c in (found, config)]
  assert types[0] == types[1]
  configuration.check(found)
  run.check_config(found, tmp_path, free=())
  found.data.root = "elsewhere"  # As on the command line; another type is refused there.
  with pytest.raises(TypeError):
    found.eval.recall_at = "elsewhere"


def test_a_run_that_is_older_than_a_field_is_read_back(tmp_path):
  config = default.get_config()
  run.save_config(config, tmp_path)
  old = json.loads((tmp_path / "config.json").read_text())
  del old["method"], old["model"]["backbone"]["mean"]
  (tmp_path / "config.json").write_text(json.dumps(old))
  found = saved.get_config(str(tmp_path))
  assert found.to_dict() == config.to_dict()
  run.check_config(found, tmp_path, free=())


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "config.json: no run to take the configuration from"),
    ("{", "config.json: not valid JSON"),
    ("[]", "config.json: expected an object"),
    ('{"batch_size": "many"}', "config.json: .*batch_size"),
    ('{"eval": 3}', "config.json: .*eval"),
  ],
)
def test_a_folder_without_a_configuration_is_refused_in_one_line(content, message, tmp_path):
  if content is not None:
    (tmp_path / "config.json").write_text(content)
  with pytest.raises(flags.IllegalFlagValueError, match=message) as error:
    saved.get_config(str(tmp_path))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", *CONFIGS])
def test_zero_shot_takes_a_data_set_and_leaves_sizes_to_the_towers(name):
  config = zero_shot.get_config(name)
  data = importlib.import_module(f"configs.{name or 'fashioniq_all'}").get_config()
  assert (config.method, config.data.dataset) == ("zero_shot", data.data.dataset)
  assert config.eval.best_metric == data.eval.best_metric
  assert config.name == (f"zero_shot_{name}" if name else "zero_shot")
  assert (config.data.image_size, config.data.resize, config.data.max_words) == (None, None, None)


def test_zero_shot_refuses_other_names_in_one_line_with_the_choices():
  with pytest.raises(flags.IllegalFlagValueError, match="'shoe' after .* fashioniq_all, .*shoes"):
    zero_shot.get_config("shoe")


@pytest.mark.parametrize("preset", presets.TOWER_PRESETS)
@pytest.mark.parametrize("name", ["fashioniq_all", "shoes", "fashion200k", "demo"])
def test_a_preset_on_towers_can_be_used_with_every_data_set(name, preset):
  config = importlib.import_module(f"configs.{name}").get_config(preset)
  assert (config.preset, config.name) == (preset, f"{name}_{preset}")
  if not config.model.encoder:  # As of a folder of towers.
    config.model.encoder = tiny_towers.description(image_size=224, length=77)
    config.model.pretrained = "somewhere"
  pretrained.describe(config)
  configuration.check(config)
  method = methods.create(config, vocab_size=100)
  assert method.vector_dim == config.model.encoder.vector_dim
  if first := stages.fine_tuning(config):
    configuration.check(first)


@pytest.mark.parametrize("names", ["clip4cir,swin_base", "crn,bank", "clip4cir,bank"])
def test_a_preset_on_towers_has_no_backbone(names):
  with pytest.raises(flags.IllegalFlagValueError, match="a preset without a backbone .clip4cir, "):
    default.get_config(names)


@pytest.mark.parametrize(
  ("names", "label", "backbone"),
  [
    ("tirg", "tirg", "resnet18"),
    ("equal,tirg", "tirg_equal", "resnet50"),
    ("tirg,swin_tiny", "tirg_swin_tiny", "swin_tiny"),
    ("crn,equal", "crn_equal", "resnet50"),
    ("equal,swin_tiny", "crn_equal_swin_tiny", "swin_tiny"),
  ],
)
def test_equal_is_part_of_the_label(names, label, backbone):
  config = default.get_config(names)
  assert (config.preset, config.model.backbone.name) == (label, backbone)


def test_on_equal_terms_methods_differ_in_nothing_but_their_composition_and_its_losses():
  def terms(preset):
    fields = run.flat(default.get_config(f"{preset},equal").to_dict())
    own = ("preset", "method", "loss.", "single.", "data.markers", "model.composition")
    own += ("model.aggregation", "model.keep_map", "model.mask_padding", "model.map_dim")
    return {k: v for k, v in fields.items() if not k.startswith(own)}

  ours = [terms(p) for p in presets.PRESETS if p not in presets.TOWER_PRESETS]
  assert all(fields == ours[0] for fields in ours)


def test_the_order_does_not_matter():
  ours, other = (default.get_config(n) for n in ("clvc_net,swin_base", "swin_base,clvc_net"))
  assert ours.to_dict() == other.to_dict()


@pytest.mark.parametrize("names", ["crm", "crn,clvc_net", "swin_base,swin_tiny", "crn;swin_base"])
def test_other_names_are_refused_in_one_line_with_the_choices(names):
  with pytest.raises(flags.IllegalFlagValueError) as error:
    default.get_config(names)
  message = str(error.value)
  for known in (repr(names), *presets.PRESETS, *registry.BACKBONES):
    assert known in message, known
  assert "\n" not in message


def test_pretrained_weights_follow_the_backbone_until_they_are_set():
  config = default.get_config("crn")
  assert config.model.pretrained == "weights/swin_large"
  config.model.backbone.name = "resnet50"  # As on the command line.
  assert config.model.pretrained == "weights/resnet50"
  config.model.pretrained = ""
  config.model.backbone.name = "swin_tiny"
  assert config.model.pretrained == ""


def test_clvc_net_has_its_published_settings():
  config = default.get_config("clvc_net")
  assert (config.batch_size, config.optimizer.learning_rate) == (32, 1e-4)
  assert (config.model.word_dim, config.model.map_dim) == (512, None)
  assert config.model.aggregation == "none"
  assert config.loss.modification == config.loss.auxiliary == 0.0


def test_val_has_the_settings_of_its_authors_scripts_and_on_equal_terms_the_others():
  config, equal = default.get_config("val"), default.get_config("val,equal")
  assert (config.model.feature_dim, config.model.word_dim, config.batch_size) == (1024, 512, 32)
  assert (config.loss.classification, config.loss.triplet, config.single.margin) == (0, 1, 0.2)
  optimizer = config.optimizer
  assert (optimizer.algorithm, optimizer.learning_rate) == ("adam", 2e-4)
  assert (optimizer.weight_decay, optimizer.ema_decay) == (4e-5, 0.9999)
  assert equal.model.composition == "val"
  assert (equal.loss.classification, equal.loss.triplet, equal.optimizer.ema_decay) == (1, 0, 0)


def test_an_unknown_backbone_is_refused_with_the_choices():
  config = default.get_config().model.backbone
  config.name = "resnet51"
  with pytest.raises(ValueError, match="'resnet51'; choose one of swin_tiny, .*18, resnet50$"):
    registry.create(config)


def test_a_size_that_a_backbone_does_not_have_is_refused():
  config = default.get_config("resnet50").model.backbone
  config.window_size = 12
  with pytest.raises(ValueError, match="window_size = 12 is set, but resnet50 has no such size"):
    registry.create(config)


@pytest.mark.parametrize("name", [n for n in registry.BACKBONES if n.startswith("swin")])
def test_a_named_swin_has_all_tensors_of_timm(name):
  """Names and shapes, of timm itself; without its classifier."""
  module = registry.create(default.get_config(name).model.backbone)
  params = jax.eval_shape(
    lambda: module.init(jax.random.key(0), np.zeros((1, 224, 224, 3)), train=False)["params"]
  )
  with torch.device("meta"):  # Without values.
    model = timm_models.create_model(f"{name}_patch4_window7_224", num_classes=0)
  expected = {k: list(v.shape) for k, v in model.state_dict().items()}
  ours = release.torch_shapes("local", {"backbone": params})
  assert {k.removeprefix(release.BACKBONE): list(v) for k, v in ours.items()} == expected
  assert module.map_dim == expected["norm.weight"][0]
