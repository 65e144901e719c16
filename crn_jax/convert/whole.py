"""Whole models: the release's two files -> a work directory, and back."""

import dataclasses
import itertools
import json
import os
import pathlib
import re

import flax.core
import jax
import ml_collections
import numpy as np
import safetensors.numpy
from flax import traverse_util

from crn_jax import state
from crn_jax.convert import backbone, layout, pickles, recognise, release, timm, torchvision
from crn_jax.convert import source as sources
from crn_jax.errors import UserError
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.methods import registry as methods
from crn_jax.methods.base import Variables
from crn_jax.models import crn
from crn_jax.models.backbones import registry
from crn_jax.workdir import files, run
from crn_jax.workdir.checkpoint import CheckpointReader, Checkpoints

_COUNTER = "num_batches_tracked"
_VOCABULARY = "vocab.json"
LEFT_OUT = (
  (rf"(.*\.)?{_COUNTER}", "counter of batches; the momentum of the statistics is constant"),
  *(
    (re.escape(release.BACKBONE) + pattern, why)
    for pattern, why in (*timm.LEFT_OUT, *torchvision.LEFT_OUT)
  ),
)


@dataclasses.dataclass(frozen=True)
class _Half:
  source: sources.Source
  prefix: str
  tensors: dict[str, np.ndarray]
  left_out: dict[str, str]


def paths_of(given: str) -> list[pathlib.Path] | None:
  """The two files of a whole model, or None if that is not what is given.

  Args:
    given: 'local,global', or a folder with local_model and global_model, .pt or .safetensors.

  Raises:
    UserError: if one of the two is missing.
  """
  paths = [pathlib.Path(part) for part in given.split(",")]
  if len(paths) == 1:
    for suffix in (".pt", ".safetensors"):
      both = [paths[0] / f"{kind}_model{suffix}" for kind in crn.BRANCHES]
      if any(path.exists() for path in both):
        paths = both
        break
    else:
      return None
  for path in paths:
    if not path.exists():
      raise UserError(f"{path}: not found; a whole model is two files, local and global")
  if len(paths) != 2:
    raise UserError(f"--input={given}: a whole model is two files, local and global")
  return paths


def convert(
  paths: list[pathlib.Path],
  target: str | os.PathLike,
  config: ml_collections.ConfigDict,
  *,
  force: bool = False,
) -> str:
  """Makes a work directory of a whole model, as if a run had just begun from it.

  Args:
    paths: file of the local and of the global model.
    target: work directory to write.
    config: configuration to evaluate or to go on training with; sizes are read off the weights.
    force: whether an existing target may be replaced.

  Returns:
    What was recognised, left out and written, for people to read.

  Raises:
    UserError: a target that must not be replaced; files that are not readable, not such models, or
      do not belong together.
  """
  backbone.check_target(target, force)
  if config.method != "crn":
    raise UserError(
      f"--config: its method is {config.method!r}; a whole model is one of CRN or CLVC-Net: name a "
      f"configuration with the preset crn_released or clvc_net after the colon"
    )
  halves = _read(paths)
  words = _vocabulary(halves)
  sizes = {kind: _sizes(half) for kind, half in halves.items()}
  if sizes["local"] != sizes["global"]:
    raise UserError(f"{paths[0]}, {paths[1]}: of different sizes: {sizes}")
  config = config.copy_and_resolve_references()
  before = run.flat(run.as_json(config.model))
  with config.unlocked():
    module = registry.create(config.model.backbone)
    found = "ResNet" if "width" in sizes["local"]["backbone"] else "SwinTransformer"
    sized = sizes["local"]["backbone"]
    expansion = sized.pop("expansion", None)  # Goes with the backbone's name.
    if type(module).__name__ != found or getattr(module, "expansion", None) != expansion:
      raise UserError(
        f"{paths[0]}: its backbone is a {found}, that of the configuration is "
        f"{config.model.backbone.name}; name another one after the configuration's colon"
      )
    config.model.backbone.update({k: v for k, v in sized.items() if getattr(module, k) != v})
    config.model.update({k: v for k, v in sizes["local"].items() if k not in ("backbone", "rows")})
  after = run.flat(run.as_json(config.model))
  changed = {f"model.{key}": value for key, value in after.items() if before.get(key) != value}
  vocabulary = Vocabulary(words, config.data.markers, config.data.max_words)
  if sizes["local"]["rows"] != len(words):
    raise UserError(
      f"{paths[0]}: {sizes['local']['rows']} rows in the word table, {len(words)} words"
    )
  method = methods.create(config, len(words))
  like = jax.eval_shape(method.init, jax.random.key(0))
  filled = {kind: _fill(kind, like, half) for kind, half in halves.items()}
  variables = {
    c: {kind: filled[kind].get(c, {}) for kind in crn.BRANCHES} for c in ("params", "batch_stats")
  }
  if without := [kind for kind, half in halves.items() if not _has_relation(half)]:
    fresh = method.init(jax.random.key(config.seed))
    for kind in without:
      variables["params"][kind]["relation"] = fresh["params"][kind]["relation"]
  tx = method.optimizer(steps_per_epoch=1, total_steps=1)  # Its state does not depend on these.
  first = state.of_variables(method, tx, variables)
  with files.replacing_folder(target) as partial:
    partial.mkdir()
    run.save_config(config, partial)
    vocabulary.save(partial / _VOCABULARY)
    with Checkpoints(partial / "checkpoints") as checkpoints:
      checkpoints.save(first)
      checkpoints.require(0)
  options = "".join(
    f" --config.{name}={str(value).replace(' ', '') if value != '' else repr('')}"
    for name, value in changed.items()
    if not isinstance(value, list)
  ) + "".join(
    f" --config.{name}='({', '.join(map(str, value))},)'"
    for name, value in changed.items()
    if isinstance(value, list)
  )
  count = sum(x.size for x in jax.tree.leaves(first.params))
  lines = []
  for kind, half in halves.items():
    lines.append(f"recognised {half.source.path}: {kind} model of CRN's PyTorch release")
    lines += backbone.describe_place(half.source.key, half.prefix)
    lines += backbone.describe_left_out(half.source.left_out | half.left_out)
  return "\n".join(
    [
      *lines,
      f"{len(words)} words, {count:,} parameters; sizes: {sizes['local']}",
      f"written {target}. Evaluate it with",
      f"  python main.py --config=CONFIG --mode=eval --checkpoint=last --workdir={target}{options}",
      "go on training with the same command without --mode and --checkpoint; CONFIG is the "
      "configuration given here.",
    ]
  )


def export(workdir: str | os.PathLike, target: str | os.PathLike, *, force: bool = False) -> str:
  """Writes a run's model for PyTorch: safetensors files and the words.

  Of CRN's runs the two branches, with the release's names; of a single branch its backbone, with
  those of timm or torchvision. The best checkpoint, or the last if none was evaluated; what
  evaluation uses of it (the moving average, if there is one).

  Raises:
    UserError: if `workdir` holds no trained run or one of a method on towers, its checkpoint is
      damaged, or the target must not be replaced.
  """
  backbone.check_target(target, force)
  workdir = pathlib.Path(workdir)
  run.check_trained(workdir)
  config = run.load_config(workdir)
  if config.method not in ("crn", "single"):
    raise UserError(
      f"{workdir}: is a run of the method {config.method!r}; exported are those of 'crn' and "
      f"'single', whose parts PyTorch's programs have names for"
    )
  vocabulary = Vocabulary.load(workdir / _VOCABULARY)
  like = state.abstract(methods.create(config, len(vocabulary)))
  params = like.evaluated_field
  with CheckpointReader(workdir / "checkpoints") as checkpoints:
    best = checkpoints.best_step()
    step = best if best is not None else max(checkpoints.steps(), default=None)
    if step is None:
      raise UserError(f"{workdir / 'checkpoints'}: holds no checkpoint")
    variables = checkpoints.restore_fields(step, like, (params, "batch_stats"))
  parts, names = _exported(config, variables)
  with files.replacing_folder(target) as partial:
    partial.mkdir()
    for part, tensors in parts.items():
      counters = [n.replace("running_mean", _COUNTER) for n in tensors if "running_mean" in n]
      tensors |= {name: np.asarray(step, np.int64) for name in counters}
      safetensors.numpy.save_file(tensors, partial / f"{part}.safetensors")
    word2id = {word: i for i, word in enumerate(vocabulary.words)}
    (partial / _VOCABULARY).write_text(json.dumps(word2id, indent=1), encoding="utf-8")
  chosen = "best" if best is not None else "last"
  return f"written {target}: {chosen} checkpoint (step {step}), {names}"


def _exported(
  config: ml_collections.ConfigDict, variables: Variables
) -> tuple[dict[str, dict[str, np.ndarray]], str]:
  """Name of a file -> its tensors; and what these are called."""
  if config.method == "single":
    backbone_only = [{"backbone": tree["single"]["backbone"]} for tree in variables.values()
                     if "backbone" in tree["single"]]  # fmt: skip
    tensors = {
      name.removeprefix(release.BACKBONE): array
      for tree in backbone_only
      for name, array in release.export_branch("local", tree).items()
    }
    return {"backbone": tensors}, "its backbone's names in timm or torchvision"
  # CLVC-Net has neither HAT nor the relation, whose parameters are there but untrained.
  left_out = () if config.model.aggregation != "none" else ("relation",)
  parts = {f"{kind}_model": {} for kind in crn.BRANCHES}
  for kind, collection in itertools.product(crn.BRANCHES, variables.values()):
    tree = {k: v for k, v in collection[kind].items() if k not in left_out}
    parts[f"{kind}_model"] |= release.export_branch(kind, tree)
  return parts, "names of the PyTorch release"


def _read(paths: list[pathlib.Path]) -> dict[str, _Half]:
  halves = {}
  for path in paths:
    source = sources.read(path)
    # What stands before the names is of a wrapper, e.g. 'module.' of DataParallel.
    found = re.compile(rf"((?:.*?\.)??)({'|'.join(crn.BRANCHES)})_fuse\..*")
    prefix, kind = next((m.groups() for m in map(found.fullmatch, source.tensors) if m), ("", None))
    if kind is None:
      raise UserError(
        f"{path}: no model of CRN's PyTorch release: neither local_fuse nor global_fuse in its "
        f"{len(source.tensors)} tensors ({', '.join(sorted(source.tensors)[:3])} ...)"
      )
    if kind in halves:
      raise UserError(f"{paths[0]}, {paths[1]}: both are {kind} models")
    tensors, outside = recognise.split(source.tensors, (), prefix)
    tensors, left_out = recognise.split(_place_backbone(tensors), LEFT_OUT)
    halves[kind] = _Half(source, prefix, timm.modern_names(tensors), outside | left_out)
  return {kind: halves[kind] for kind in crn.BRANCHES}


def _place_backbone(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames a ResNet, wherever it is, to where the release has its Swin Transformer.

  Where CLVC-Net's is was not known to us; its own names are those of every ResNet.
  """
  found = [m[1] for n in tensors if (m := re.match(r"(.*?)layer1\.0\.conv1\.weight$", n))]
  if not found:
    return tensors
  own = re.compile(re.escape(found[0]) + r"((?:conv1|bn1|layer\d+|fc)\..*)")
  return {
    release.BACKBONE + m[1] if (m := own.fullmatch(name)) else name: tensor
    for name, tensor in tensors.items()
  }


def _has_relation(half: _Half) -> bool:
  return any(name.startswith("correct_module.") for name in half.tensors)


def _sizes(half: _Half) -> dict:
  """Fields of `config.model` that follow from the weights, and the rows of the word table."""
  tensors = half.tensors
  start = release.BACKBONE
  own = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
  read = torchvision.resnet_arguments if "conv1.weight" in own else timm.swin_arguments
  lift = tensors.get("img_model.img1x1conv3.weight")
  try:
    return {
      "backbone": read(own),
      "map_dim": None if lift is None else lift.shape[0],
      "feature_dim": tensors["img_model.img_fc.weight"].shape[0],
      "word_dim": tensors["text_model.embedding_layer.weight"].shape[1],
      "rows": tensors["text_model.embedding_layer.weight"].shape[0],
    }
  except (KeyError, IndexError) as error:
    raise UserError(f"{half.source.path}: missing or misshapen tensor: {error}") from error


def _fill(kind: str, like: Variables, half: _Half) -> dict:
  tree = {collection: parts[kind] for collection, parts in like.items()}
  flat = traverse_util.flatten_dict(flax.core.unfreeze(tree))
  if not _has_relation(half):
    flat = {path: value for path, value in flat.items() if path[1] != "relation"}
  names = {path: release.release_name(kind, path[1:]) for path in flat}
  source = str(half.source.path)
  return traverse_util.unflatten_dict(
    layout.fill(flat, names, half.tensors, source, f"{kind} model")
  )


def _vocabulary(halves: dict[str, _Half]) -> tuple[str, ...]:
  """Words in the order of their ids; both models of a run carry the same ones."""
  found = {kind: _word_ids(half) for kind, half in halves.items()}
  if found["local"] != found["global"]:
    raise UserError(
      f"{halves['local'].source.path}, {halves['global'].source.path}: of different vocabularies, "
      f"so not of one run"
    )
  word2id, path = found["local"], halves["local"].source.path
  ids = list(word2id.values())
  if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
    raise UserError(f"{path}: the ids of its {len(ids)} words are not 0, 1, 2, ...")
  return tuple(sorted(word2id, key=word2id.get))


def _word_ids(half: _Half) -> dict:
  path = half.source.path
  if half.source.module is None:
    beside = path.parent / _VOCABULARY
    if not beside.exists():
      raise UserError(f"{beside}: not found; a state dict needs its words (word -> id)")
    word2id = json.loads(beside.read_text(encoding="utf-8"))
  else:
    module = half.source.module
    for name in half.prefix.split(".")[:-1]:
      module = module.attributes["_modules"][name]
    text = module.attributes["_modules"].get("text_model")
    vocabulary = text.attributes.get("vocab") if isinstance(text, pickles.Stub) else None
    word2id = vocabulary.attributes.get("word2id") if isinstance(vocabulary, pickles.Stub) else None
  if not isinstance(word2id, dict):
    raise UserError(f"{path}: no vocabulary (text_model.vocab.word2id) in it")
  return word2id
