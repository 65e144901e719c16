"""What a configuration must be: the rule of every field, and what fields must agree on.

`check` runs before anything is read or written, and says everything that is wrong at once. A new
field of `configs/default.py` needs a line in `RULES`.
"""

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import ml_collections

from crn_jax.errors import UserError
from crn_jax.input_pipeline.checks import folder
from crn_jax.input_pipeline.loader import AUGMENTATIONS
from crn_jax.input_pipeline.readers import fashioniq, shoes
from crn_jax.input_pipeline.registry import DATASETS
from crn_jax.input_pipeline.tokenizers.words import MARKERS
from crn_jax.methods import optimizer, zero_shot
from crn_jax.methods.registry import METHODS, uses_features
from crn_jax.models import remat
from crn_jax.models.backbones.registry import BACKBONES
from crn_jax.models.composition.registry import COMPOSITIONS
from crn_jax.models.preprocessing import INTERPOLATIONS
from crn_jax.models.text.registry import TEXT_ENCODERS
from crn_jax.retrieval import metrics
from crn_jax.workdir import run

# Fields whose leading ~ stands for the home folder; the shell leaves it in --config.data.root=~/x.
PATHS = ("data.root", "data.prepared", "data.features", "model.pretrained")


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a value must be.

  Attributes:
    expected: in words, after "expected".
    holds: whether a value is so; takes values of any type.
  """

  expected: str
  holds: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Choice:
  """A rule: one of some names. They are looked up at each use, as tables of names may grow."""

  names: Collection[str]

  @property
  def expected(self) -> str:
    return f"one of {', '.join(map(repr, self.names))}"

  def holds(self, value) -> bool:
    return isinstance(value, str) and value in self.names


def integer(low: int, high: int | None = None) -> Rule:
  """An integer, both bounds included."""
  expected = f"an integer, {low} or more" if high is None else f"an integer, {low} to {high}"
  return Rule(expected, lambda x: _is_integer(x) and low <= x and (high is None or x <= high))


def number(condition: str, holds: Callable[[float], bool]) -> Rule:
  """A finite number under a condition."""
  return Rule(f"a number {condition}", lambda x: _is_number(x) and holds(x))


def several(rule: Rule, what: str, holds: Callable[[tuple], bool] = bool) -> Rule:
  """A tuple or list of values, under a condition on all of them; by default, not empty."""
  return Rule(
    what,
    lambda x: isinstance(x, (tuple, list)) and all(map(rule.holds, x)) and holds(tuple(x)),
  )


def optional(rule: Rule | Choice) -> Rule:
  """None, or what the rule says."""
  return Rule(f"{rule.expected}, or None", lambda x: x is None or rule.holds(x))


def _is_integer(x) -> bool:
  return isinstance(x, int) and not isinstance(x, bool)


def _is_number(x) -> bool:
  return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


POSITIVE = number("above 0", lambda x: x > 0)
NOT_NEGATIVE = number("of 0 or more", lambda x: x >= 0)
SHARE = number("of 0 or more, below 1", lambda x: 0 <= x < 1)
TRUTH = Rule("True or False", lambda x: isinstance(x, bool))
TEXT = Rule("a text", lambda x: isinstance(x, str))
NAME = Rule("a text that is not empty", lambda x: isinstance(x, str) and x != "")
SIZES = several(integer(1), "a tuple of integers, each 1 or more, one a stage")

# Field -> its rule. Where modules have a name for their choices, it is theirs.
RULES: dict[str, Rule | Choice] = {
  "name": NAME,
  "preset": NAME,
  "method": Choice(METHODS),
  "seed": integer(0, 2**32 - 1),
  "num_epochs": integer(1),
  "batch_size": integer(1),
  "update_mode": Choice(("alternating", "simultaneous")),
  "data.dataset": Choice(DATASETS),
  "data.root": NAME,
  "data.category": Choice((*fashioniq.CATEGORIES, "all")),
  "data.on_missing": Choice(folder.ON_MISSING),
  "data.captions": Choice(fashioniq.CAPTION_USES),
  "data.shoes_pairs": Choice(shoes.PAIRS),
  "data.max_words": integer(3),  # Two markers and a word.
  "data.image_size": integer(1),
  "data.resize": integer(1),
  "data.max_ratio": optional(number("of 1 or more", lambda x: x >= 1)),
  "data.augment": Choice(AUGMENTATIONS),
  "data.prepared": TEXT,
  "data.features": NAME,
  "data.cache_images": TRUTH,
  "data.markers": Choice(MARKERS),
  "model.backbone.name": Choice(BACKBONES),
  "model.backbone.depths": optional(SIZES),
  "model.backbone.embed_dim": optional(integer(1)),
  "model.backbone.num_heads": optional(SIZES),
  "model.backbone.patch_size": optional(integer(1)),
  "model.backbone.window_size": optional(integer(1)),
  "model.backbone.drop_path_rate": optional(SHARE),
  "model.backbone.width": optional(integer(1)),
  "model.backbone.mean": optional(
    several(number("", lambda x: True), "three numbers", lambda x: len(x) == 3)
  ),
  "model.backbone.std": optional(several(POSITIVE, "three numbers above 0", lambda x: len(x) == 3)),
  "model.backbone.interpolation": optional(Choice(INTERPOLATIONS)),
  "model.pretrained": TEXT,
  "model.map_dim": optional(integer(1)),
  "model.feature_dim": integer(1),
  "model.word_dim": integer(1),
  "model.keep_map": TRUTH,
  "model.composition": optional(Choice(COMPOSITIONS)),
  "model.text_encoder": Choice(TEXT_ENCODERS),
  "model.aggregation": Choice(("used", "discarded", "none")),
  "model.mask_padding": TRUTH,
  "model.attention_temperature.local": POSITIVE,
  "model.attention_temperature.global": POSITIVE,
  "model.dtype": Choice(("float32", "bfloat16")),
  "model.precision": Choice(("default", "highest")),
  "model.remat": Choice(remat.CHOICES),
  "zero_shot.query": Choice(zero_shot.QUERIES),
  "zero_shot.slerp_weight": number("from 0 to 1", lambda x: 0 <= x <= 1),
  "loss.classification": NOT_NEGATIVE,
  "loss.cross_branch": NOT_NEGATIVE,
  "loss.mutual_kl": NOT_NEGATIVE,
  "loss.perceptual": NOT_NEGATIVE,
  "loss.modification": NOT_NEGATIVE,
  "loss.auxiliary": NOT_NEGATIVE,
  "loss.triplet": NOT_NEGATIVE,
  "loss.correction": NOT_NEGATIVE,
  "loss.joint": NOT_NEGATIVE,
  "optimizer.learning_rate": POSITIVE,
  "optimizer.algorithm": Choice(optimizer.ALGORITHMS),
  "optimizer.weight_decay": NOT_NEGATIVE,
  "optimizer.momentum": SHARE,
  "optimizer.betas": several(SHARE, "two numbers of 0 or more, below 1", lambda x: len(x) == 2),
  "optimizer.epsilon": POSITIVE,
  "optimizer.schedule": Choice(("step", "cosine")),
  "optimizer.decay_every_epochs": integer(1),
  "optimizer.decay_factor": POSITIVE,
  "optimizer.max_decay_epoch": integer(0),
  "optimizer.warmup_steps": integer(0),
  "optimizer.clip_norm": NOT_NEGATIVE,
  "optimizer.logit_scale_rate": NOT_NEGATIVE,
  "optimizer.backbone_rate": NOT_NEGATIVE,
  "optimizer.ema_decay": SHARE,
  "single.margin": POSITIVE,
  "clip4cir.dropout": SHARE,
  "bank.temperature": POSITIVE,
  "finetune.num_epochs": integer(0),
  "finetune.batch_size": integer(1),
  "finetune.evaluate_every_epochs": integer(1),
  "parallel.mode": Choice(("shard_map", "pmap")),
  "eval.batch_size": integer(1),
  "eval.every_epochs": integer(1),
  "eval.recall_at": several(
    integer(1),
    "a tuple of different integers, each 1 or more",
    lambda x: len(x) > 0 and len(set(x)) == len(x),
  ),
  "eval.exclude_reference": TRUTH,
  "eval.best_metric": Rule(
    "PROTOCOL/METRIC, e.g. 'val_split/R@10'",
    lambda x: isinstance(x, str) and all(x.partition("/")),
  ),
  "log_every_steps": integer(1),
  "checkpoint_every_steps": integer(1),
  "deterministic_ops": TRUTH,
  "profile_steps": several(
    integer(1),
    "() or the first and the last step, e.g. (10, 12)",
    lambda x: not x or (len(x) == 2 and x[0] <= x[1]),
  ),
}

RULES |= {f"finetune.{name}": r for name, r in RULES.items() if name.startswith("optimizer.")}


def protocols(dataset: str) -> tuple[str, ...]:
  """Names of a data set's protocols, as in eval.json."""
  return tuple(DATASETS[dataset].protocols)


@dataclasses.dataclass(frozen=True)
class Agreement:
  """What several fields must be together. Looked at if each of them is right, and none is None.

  Attributes:
    fields: their names. Sizes that are None are those of the named backbone.
    wrong: their values -> what was expected of them, or None if it is so.
  """

  fields: tuple[str, ...]
  wrong: Callable[..., str | None]


def _crop(resize: int, image_size: int) -> str | None:
  return None if resize >= image_size else "a short side that the crop fits into"


def _unprepared(prepared: str, max_ratio: float) -> str | None:
  del max_ratio
  return "'', as prepared images are not padded" if prepared else None


def _patches(image_size: int, patch_size: int) -> str | None:
  return "a multiple of the patch size" if image_size % patch_size else None


def _stages(depths: tuple, num_heads: tuple) -> str | None:
  return None if len(depths) == len(num_heads) else "both of the same number of stages"


def _heads(embed_dim: int, num_heads: tuple) -> str | None:
  widths = [embed_dim * 2**stage for stage in range(len(num_heads))]
  if any(width % heads for width, heads in zip(widths, num_heads, strict=True)):
    return f"the stages' widths, {widths}, to be multiples of their heads"
  return None


def _towers(pretrained: str, epochs: int) -> str | None:
  if pretrained or epochs:
    return None
  return "the folder of pretrained towers, or epochs to train them from random values"


def _protocol(best_metric: str, dataset: str) -> str | None:
  known = protocols(dataset)
  if best_metric.partition("/")[0] in known:
    return None
  return f"a protocol of {dataset} before the slash: {' or '.join(known)}"


def _metric(best_metric: str, recall_at: tuple, dataset: str) -> str | None:
  spec = DATASETS[dataset]
  known = metrics.names(recall_at, subsets=spec.has_subsets, truths=spec.has_truths)
  return (
    None if best_metric.partition("/")[2] in known else f"{' or '.join(known)} behind the slash"
  )


def _conditioned(composition: str, backbone: str) -> str | None:
  wanted = COMPOSITIONS[composition].backbones
  return None if backbone in (wanted or BACKBONES) else f"one of the backbones {', '.join(wanted)}"


def _pairs(loss: str) -> Agreement:
  def wrong(composition: str, weight: float) -> str | None:
    fits = not weight or loss in COMPOSITIONS[composition].pair_losses
    return None if fits else f"0, as model.composition = {composition!r} has no such scores"

  return Agreement(("model.composition", f"loss.{loss}"), wrong)


def _losses(*weights: float) -> str | None:
  return None if any(weights) else "one of them above 0 (loss.perceptual is of one branch only)"


AGREEMENTS = (
  Agreement(("data.resize", "data.image_size"), _crop),
  Agreement(("data.prepared", "data.max_ratio"), _unprepared),
  Agreement(("eval.best_metric", "data.dataset"), _protocol),
  Agreement(("eval.best_metric", "eval.recall_at", "data.dataset"), _metric),
)

# Of methods with a backbone, not with towers.
BACKBONE_AGREEMENTS = (
  Agreement(("data.image_size", "model.backbone.patch_size"), _patches),
  Agreement(("model.backbone.depths", "model.backbone.num_heads"), _stages),
  Agreement(("model.backbone.embed_dim", "model.backbone.num_heads"), _heads),
)

# Of methods on features of frozen towers.
FEATURE_AGREEMENTS = (Agreement(("model.pretrained", "finetune.num_epochs"), _towers),)

# Of CRN, on a backbone or towers; Inception units want these multiples, see `InceptionUnit`.
CRN_AGREEMENTS = (
  Agreement(("model.feature_dim",), lambda dim: "a multiple of 32" if dim % 32 else None),
  Agreement(("model.map_dim",), lambda dim: "a multiple of 16" if dim % 16 else None),
  Agreement(
    tuple(f"loss.{t}" for t in ("classification", "cross_branch", "mutual_kl", "modification",
                                "auxiliary")), _losses,
  ),
)  # fmt: skip

_OF_PAIRS = ("correction", "joint")
_OF_CRN = ("cross_branch", "mutual_kl", "perceptual", "modification", "auxiliary")

# Of one branch with a composition.
SINGLE_AGREEMENTS = (
  *(
    Agreement((f"loss.{term}",), lambda weight: "0, as it is a loss of CRN" if weight else None)
    for term in _OF_CRN
  ),
  Agreement(
    ("loss.classification", "loss.triplet"),
    lambda *weights: None if any(weights) else "one of them above 0",
  ),
  Agreement(("model.composition", "model.backbone.name"), _conditioned),
  *map(_pairs, _OF_PAIRS),
  Agreement(
    ("model.text_encoder", "model.feature_dim"),
    lambda t, d: "an even model.feature_dim" if t == "bigru" and d % 2 else None,
  ),
)

# Of methods with other compositions.
OTHER_AGREEMENTS = (
  Agreement(("method", "model.composition"), lambda m, c: f"None, as the method is {m!r}"),
  Agreement(
    ("method", "model.text_encoder"),
    lambda m, t: None if t == "lstm" else f"'lstm', as the method is {m!r}",
  ),
  *(
    Agreement(("method", f"loss.{term}"), lambda m, w: f"0, as the method is {m!r}" if w else None)
    for term in ("triplet", *_OF_PAIRS)
  ),
)


def check(
  config: ml_collections.ConfigDict, *, train_devices: int = 1, eval_devices: int = 1
) -> None:
  """Checks a whole configuration; reads and writes nothing.

  Args:
    config: see `configs/default.py`.
    train_devices: number of devices that `batch_size` is spread over.
    eval_devices: number of devices that `eval.batch_size` is spread over.

  Raises:
    UserError: lists all that is wrong: the field, its value, and what was expected.
  """
  devices = {"batch_size": train_devices, "eval.batch_size": eval_devices}
  if problems := list(_problems(run.flat(config.to_dict()), devices)):
    raise UserError(
      "the configuration cannot be used:\n  "
      + "\n  ".join(problems)
      + "\nGive other values, e.g. --config.FIELD=VALUE; configs/default.py explains every field"
    )


def expand_paths(config: ml_collections.ConfigDict) -> None:
  """Replaces the leading ~ of the fields in `PATHS` by the home folder, in place."""
  fields = run.flat(config.to_dict())
  for name in PATHS:
    # Others stay untouched: one of them follows another field. What is no text is `check`'s.
    if isinstance(path := fields.get(name), str) and path.startswith("~"):
      config.update_from_flattened_dict({name: os.path.expanduser(path)})


def did_you_mean(name: str, known: Mapping[str, str]) -> str:
  """A question to end a message about an unknown name with, or nothing.

  Args:
    name: what is unknown. The last part of a field's name finds the field: 'root' -> 'data.root'.
    known: name -> what to say for it.
  """
  close = difflib.get_close_matches(name, known, cutoff=0.7)
  if not close:
    by_end = {other.rpartition(".")[2]: other for other in reversed(list(known))}
    ends = difflib.get_close_matches(name.rpartition(".")[2], by_end, cutoff=0.7)
    end = name.rpartition(".")[2]
    close = [by_end[end] for end in ([end] if end in by_end else ends)]
  return f"; did you mean {' or '.join(known[other] for other in close)}?" if close else ""


def _problems(fields: Mapping[str, Any], devices: Mapping[str, int]) -> Iterator[str]:
  # The description of towers is checked by the module that they are.
  known = {name for name in fields if name.startswith("model.encoder.")}.union(RULES)
  for name in (name for name in fields if name not in known):
    yield f"{name} = {fields[name]!r}: no such field{did_you_mean(name, {n: n for n in RULES})}"
  valid = {}
  for name, rule in RULES.items():
    if name not in fields:
      yield f"{name}: is missing; expected {rule.expected}"
    elif not rule.holds(fields[name]):
      yield f"{name} = {fields[name]!r}: expected {rule.expected}"
    else:
      valid[name] = fields[name]
  for name, count in devices.items():
    if name in valid and valid[name] % count:
      yield f"{name} = {valid[name]}: expected a multiple of the number of devices, {count}"
  has_backbone = "method" not in valid or METHODS[valid["method"]].pretrained == "backbone"
  if has_backbone and all(name in valid for name in RULES if name.startswith("model.")):
    yield from _foreign_sizes(valid)
    valid |= _named_sizes(valid)
  agreements = AGREEMENTS + (BACKBONE_AGREEMENTS if has_backbone else ())
  agreements += FEATURE_AGREEMENTS if "method" in valid and uses_features(valid["method"]) else ()
  agreements += CRN_AGREEMENTS if fields.get("method") in ("crn", "crn_towers") else ()
  agreements += SINGLE_AGREEMENTS if fields.get("method") == "single" else OTHER_AGREEMENTS
  if fields.get("method") == "single" and fields.get("model.composition") is None:
    yield f"model.composition = None: expected one of {', '.join(map(repr, COMPOSITIONS))}"
  for agreement in agreements:
    values = [valid.get(name) for name in agreement.fields]
    if None not in values and (expected := agreement.wrong(*values)):
      shown = ", ".join(f"{n} = {v!r}" for n, v in zip(agreement.fields, values, strict=True))
      yield f"{shown}: expected {expected}"


_BACKBONE = "model.backbone."


def _module_fields(fields: Mapping[str, Any]) -> set[str]:
  module = BACKBONES[fields[f"{_BACKBONE}name"]].module
  return {field.name for field in dataclasses.fields(module)}


def _foreign_sizes(fields: Mapping[str, Any]) -> Iterator[str]:
  """Sizes that are set, but that the named kind of backbone does not have."""
  common = {"name", "mean", "std", "interpolation"} | _module_fields(fields)
  for name, value in fields.items():
    size = name.removeprefix(_BACKBONE)
    if name.startswith(_BACKBONE) and value is not None and size not in common:
      yield (
        f"{name} = {value!r}: expected None, as {fields[f'{_BACKBONE}name']} has no such size; or "
        f"name another backbone behind the configuration's colon"
      )


def _named_sizes(fields: Mapping[str, Any]) -> dict[str, Any]:
  """What stands for the sizes that are None."""
  named = BACKBONES[fields[f"{_BACKBONE}name"]]
  own = {n: fields.get(f"{_BACKBONE}{n}") for n in _module_fields(fields)}
  module = named.module(**(named.sizes | {n: v for n, v in own.items() if v is not None}))
  sizes = {f"{_BACKBONE}{n}": getattr(module, n) for n in own if f"{_BACKBONE}{n}" in RULES}
  map_dim = fields["model.map_dim"]
  return sizes | {"model.map_dim": module.map_dim if map_dim is None else map_dim}
