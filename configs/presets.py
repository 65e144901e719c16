"""What the names after a configuration's colon stand for."""

import dataclasses
from collections.abc import Callable

import ml_collections
from absl import flags
from ml_collections import config_dict

from crn_jax.models.backbones.registry import BACKBONES

# Same backbone, sizes, budget and optimizer for every method, in the place of its paper's.
EQUAL = "equal"
EQUAL_BACKBONE = "resnet50"


@dataclasses.dataclass(frozen=True)
class Preset:
  """A method with the settings of its paper.

  Attributes:
    backbone: that it has unless another is named; None: it works on pretrained towers, which
      `model.pretrained` names.
    settings: changes a configuration of `configs/default.py` in place.
    method: changes what makes it this method, whatever the settings.
  """

  backbone: str | None
  settings: Callable[[ml_collections.ConfigDict], None] = lambda config: None
  method: Callable[[ml_collections.ConfigDict], None] = lambda config: None


@dataclasses.dataclass(frozen=True)
class Chosen:
  """What names after a colon say."""

  preset: str
  backbone: str
  equal: bool

  @property
  def decays_with_data(self) -> bool:
    """Whether the learning rate falls as CRN's does, at epochs that depend on the data set."""
    return self.equal or self.preset in ("crn", "crn_released", "clvc_net")

  @property
  def label(self) -> str:
    """The preset, with the backbone unless it is the preset's own."""
    own = EQUAL_BACKBONE if self.equal else PRESETS[self.preset].backbone
    named = (self.backbone,) if own and self.backbone != own else ()
    return "_".join((self.preset, *((EQUAL,) if self.equal else ()), *named))


def parse(names: str) -> Chosen:
  """'clvc_net', 'swin_base', 'crn_released,swin_base', 'tirg,equal' or '' -> what they say.

  Raises:
    flags.IllegalFlagValueError: on other names; it reaches the terminal as one line.
  """
  words = [word for word in names.split(",") if word]
  presets = [word for word in words if word in PRESETS] or ["crn"]
  backbones = [word for word in words if word in BACKBONES]
  unknown = [word for word in words if word not in {*PRESETS, *BACKBONES, EQUAL}]
  on_towers = PRESETS[presets[0]].backbone is None
  if unknown or len(presets) > 1 or len(backbones) > 1 or (on_towers and len(words) > 1):
    others = ", ".join(name for name in PRESETS if name not in TOWER_PRESETS)
    # Not a ValueError, to which the configuration's parser adds a traceback.
    raise flags.IllegalFlagValueError(
      f"{names!r} after the configuration's colon: expected a preset ({others}), a backbone "
      f"({', '.join(BACKBONES)}), one of each with a comma between them, with or without "
      f"'{EQUAL}', or a preset without a backbone ({', '.join(TOWER_PRESETS)})"
    )
  equal = EQUAL in words
  own = EQUAL_BACKBONE if equal else PRESETS[presets[0]].backbone or PRESETS["crn"].backbone
  return Chosen(presets[0], backbones[0] if backbones else own, equal)


def apply(config: ml_collections.ConfigDict, chosen: Chosen) -> None:
  """Changes a configuration of `configs/default.py` in place."""
  preset = PRESETS[chosen.preset]
  preset.method(config)
  (_equal if chosen.equal else preset.settings)(config)


def _equal(config: ml_collections.ConfigDict) -> None:
  """Nobody's own settings: those of CLVC-Net, which are near the field's habits."""
  config.batch_size = 32
  config.optimizer.learning_rate = 1e-4
  config.model.update(feature_dim=1024, word_dim=512)


def _crn_released(config: ml_collections.ConfigDict) -> None:
  """What the PyTorch release computes, to the last digit."""
  config.model.keep_map = False
  config.model.aggregation = "discarded"
  config.model.mask_padding = False
  config.loss.modification = 0.0
  config.loss.auxiliary = 0.0
  config.data.markers = "words"


def _clvc_net(config: ml_collections.ConfigDict) -> None:
  """What CRN grew from (Wen et al., SIGIR 2021)."""
  config.model.map_dim = None
  config.model.aggregation = "none"
  config.loss.modification = 0.0
  config.loss.auxiliary = 0.0


def _of_clvc_net(config: ml_collections.ConfigDict) -> None:
  config.model.word_dim = 512
  config.batch_size = 32
  config.optimizer.learning_rate = 1e-4


def _single(composition: str) -> Callable[[ml_collections.ConfigDict], None]:
  """A method of one branch, with the loss that most of them have."""

  def method(config):
    config.method = "single"
    config.model.composition = composition
    for term in ("cross_branch", "mutual_kl", "perceptual", "modification", "auxiliary"):
      config.loss[term] = 0.0

  return method


def _of_tirg(config: ml_collections.ConfigDict) -> None:
  """Vo et al., CVPR 2019, whose paper compares with the simpler compositions in the same way."""
  config.batch_size = 32
  config.model.update(feature_dim=512, word_dim=512)
  config.optimizer.update(
    algorithm="sgd", learning_rate=1e-2, momentum=0.9, weight_decay=1e-6, backbone_rate=0.1
  )


def _of_val(config: ml_collections.ConfigDict) -> None:
  """Chen, Gong, Bazzani, CVPR 2020: the run scripts of their code, those without GloVe."""
  config.batch_size = 32
  config.model.update(feature_dim=1024, word_dim=512)
  config.loss.update(classification=0.0, triplet=1.0)
  config.single.margin = 0.2
  config.optimizer.update(learning_rate=2e-4, weight_decay=4e-5, ema_decay=0.9999)


def _dcnet(config: ml_collections.ConfigDict) -> None:
  _single("dcnet")(config)
  config.loss.update(correction=1.0, joint=0.5)


def _of_dcnet(config: ml_collections.ConfigDict) -> None:
  """Kim et al., AAAI 2021, whose paper does not say for how many epochs."""
  config.batch_size = 32
  config.model.update(feature_dim=1024, word_dim=300, text_encoder="convolution")
  config.optimizer.update(
    learning_rate=1e-4, weight_decay=0.0, decay_every_epochs=1, decay_factor=0.95,
    max_decay_epoch=1_000_000,  # Without end.
  )  # fmt: skip


def _on_towers(method: str) -> Callable[[ml_collections.ConfigDict], None]:
  """A method on a pair of towers, trained on features; sizes are the towers' own."""

  def on_towers(config):
    config.method = method
    config.model.pretrained = ""  # To be given: the folder of converted towers.
    data = config.data
    for name in ("image_size", "resize", "max_words"):  # None: the towers' own, from their files.
      del data[name]
      data[name] = config_dict.placeholder(int)
    data.captions = "mixed"
    data.max_ratio = 1.25
    data.augment = "none"

  return on_towers


_ADAMW = {"algorithm": "adamw", "weight_decay": 0.01}  # PyTorch's decay unless another is given.


def _clip4cir(config: ml_collections.ConfigDict) -> None:
  """Baldrati et al., CVPRW 2022."""
  config.batch_size = 4096
  config.num_epochs = 300
  config.optimizer.update(learning_rate=2e-5, weight_decay=0.0)
  config.eval.every_epochs = 10
  config.finetune.num_epochs = 100
  config.finetune.optimizer.update(learning_rate=2e-6, epsilon=1e-7, **_ADAMW)


def _bank(config: ml_collections.ConfigDict) -> None:
  """After SPN4CIR, Feng et al., MM 2024."""
  config.batch_size = 256
  config.num_epochs = 3
  config.optimizer.update(learning_rate=2e-5, **_ADAMW)


PRESETS: dict[str, Preset] = {
  "crn": Preset("swin_large"),
  "crn_released": Preset("swin_large", method=_crn_released),
  "clvc_net": Preset("resnet50", _of_clvc_net, _clvc_net),
  "image_only": Preset("resnet18", _of_tirg, _single("image_only")),
  "text_only": Preset("resnet18", _of_tirg, _single("text_only")),
  "concat": Preset("resnet18", _of_tirg, _single("concat")),
  "film": Preset("resnet18", _of_tirg, _single("film")),
  "tirg": Preset("resnet18", _of_tirg, _single("tirg")),
  "tirg_map": Preset("resnet18", _of_tirg, _single("tirg_map")),
  "val": Preset("resnet50", _of_val, _single("val")),
  "dcnet": Preset("resnet50", _of_dcnet, _dcnet),
  "clip4cir": Preset(None, _clip4cir, _on_towers("clip4cir")),
  "bank": Preset(None, _bank, _on_towers("bank")),
}
# Presets of methods on a pair of pretrained towers.
TOWER_PRESETS = tuple(name for name, preset in PRESETS.items() if preset.backbone is None)
