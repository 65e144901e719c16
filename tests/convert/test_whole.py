"""Whole models of the PyTorch release: in, evaluated, trained further, and out again."""

import json
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import default
from crn_jax import state, train
from crn_jax.convert import recognise, release, timm, whole
from crn_jax.errors import UserError
from crn_jax.input_pipeline.tokenizers.words import RESERVED, Vocabulary
from crn_jax.methods.crn import CRN
from crn_jax.models import crn
from crn_jax.workdir import checkpoint
from tests import tiny
from tests.release import load_json
from tests.torch_models import torch

WORDS = (*RESERVED, "is", "red", "bos", "blue", "with", "sleeves", "longer")
CLASSES = {
  "": ("model", "compose_KIND"), "img_model": ("model", "img_backbone"),
  "KIND_fuse": ("model", "KIND_conv"), "correct_module": ("model", "FusDiff"),
  "text_model": ("text_model", "TextLSTMModel"), "local_pool": ("blocks", "GeM"),
  "img_model.img_model": ("timm.models.swin_transformer", "SwinTransformer"),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return tiny.draw(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def config(root):
  config = tiny.config(root, "crn_released")
  config.num_epochs = 1
  config.model.backbone.window_size = 4  # As large as the first map, so what is read off.
  return config


@pytest.fixture(scope="module")
def variables(config):
  shapes = jax.eval_shape(lambda: CRN(config, len(WORDS)).init(jax.random.key(0)))
  rng = np.random.default_rng(0)

  def value(path, leaf):
    noise = 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
    return np.abs(noise) + 1 if path[-1].key in ("var", "scale", "p") else noise

  return jax.tree_util.tree_map_with_path(value, shapes)


@pytest.fixture(scope="module")
def modules(variables):
  """PyTorch modules with the release's class names; they go away with the test."""
  made = [name for name in ("model", "text_model", "blocks") if name not in sys.modules]
  for name in made:
    sys.modules[name] = types.ModuleType(name)
  result = {}
  for kind in crn.BRANCHES:
    tensors = {}
    for collection in variables.values():
      tensors |= release.export_branch(kind, collection[kind])
    tensors |= {n.replace("running_mean", "num_batches_tracked"): np.int64(7)
                for n in tensors if "running_mean" in n}  # fmt: skip
    module = build(kind, "", tensors)
    # As timm before 0.9: merging closes a stage; constants are buffers.
    layers = module.img_model.img_model.layers._modules
    layers["0"]._modules["downsample"] = layers["1"]._modules.pop("downsample")
    attention = layers["0"]._modules["blocks"]._modules["0"]._modules["attn"]
    attention.register_buffer("relative_position_index", torch.zeros(4, 4, dtype=torch.int64))
    module.text_model.vocab = instance("text_model", "SimpleVocab")
    module.text_model.vocab.word2id = {word: i for i, word in enumerate(WORDS)}
    module.text_model.vocab.wordcount = dict.fromkeys(WORDS, 1)
    result[kind] = module
  yield result
  for name in made:
    del sys.modules[name]


def instance(module_name, name, base=object):
  module = sys.modules[module_name]
  if not hasattr(module, name):
    setattr(module, name, type(name, (base,), {"__module__": module_name}))
  cls = getattr(module, name)
  made = cls.__new__(cls)  # timm's own would build a whole Swin Transformer.
  base.__init__(made)
  return made


def build(kind, prefix, tensors):
  where = prefix.rstrip(".").replace(kind + "_", "KIND_")
  module_name, name = CLASSES.get(where, ("torch.nn.modules.container", "Sequential"))
  module = instance(module_name, name.replace("KIND", kind), torch.nn.Module)
  children = {}
  for full, value in tensors.items():
    first, _, rest = full.partition(".")
    if rest:
      children.setdefault(first, {})[rest] = value
    elif first.startswith(("running", "num_batches")):
      module.register_buffer(first, torch.from_numpy(np.array(value)))
    else:
      module.register_parameter(first, torch.nn.Parameter(torch.from_numpy(np.array(value))))
  for first, inside in children.items():
    module.add_module(first, build(kind, f"{prefix}{first}.", inside))
  return module


@pytest.fixture(scope="module")
def files(modules, tmp_path_factory):
  folder = tmp_path_factory.mktemp("release")
  for kind, module in modules.items():
    torch.save(module, folder / f"{kind}_model.pt")
  return folder


@pytest.fixture(scope="module")
def converted(files, config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("converted") / "run"
  other = config.copy_and_resolve_references()  # Sizes are those of the weights.
  other.model.update(map_dim=2048, feature_dim=1024, word_dim=768)
  said = whole.convert(whole.paths_of(str(files)), workdir, other)
  return workdir, said


def test_values_words_and_sizes_are_those_of_the_files(converted, variables, config):
  workdir, said = converted
  assert Vocabulary.load(workdir / "vocab.json").words == WORDS
  like = state.abstract(CRN(config, len(WORDS)))
  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    assert checkpoints.steps() == [0]
    restored = checkpoints.restore(0, like)
  jax.tree.map(np.testing.assert_array_equal, restored.params, variables["params"])
  jax.tree.map(np.testing.assert_array_equal, restored.batch_stats, variables["batch_stats"])
  assert "--config.model.map_dim=32" in said and "layers.0.blocks.0.attn.relative_posi" in said
  saved = json.loads((workdir / "config.json").read_text())["model"]
  assert (saved["map_dim"], saved["feature_dim"], saved["word_dim"]) == (32, 32, 16)


def test_export_is_exact_and_loads_into_the_release(converted, modules, files, tmp_path):
  whole.export(converted[0], tmp_path / "out")
  words = json.loads((tmp_path / "out" / "vocab.json").read_text())
  assert words == {word: i for i, word in enumerate(WORDS)}
  for kind, module in modules.items():
    found = safetensors.numpy.load_file(tmp_path / "out" / f"{kind}_model.safetensors")
    expected = module.state_dict()
    for name in [n for n in expected if n.endswith("relative_position_index")]:
      del expected[name]
    renamed = {n.replace("layers.0.downsample", "layers.1.downsample"): v
               for n, v in expected.items()}  # fmt: skip
    assert found.keys() == renamed.keys()
    for name, value in renamed.items():
      assert found[name].shape == value.shape, name
      if "num_batches" not in name:  # Counts the steps of this run.
        np.testing.assert_array_equal(found[name], value.numpy(), err_msg=name)


def test_what_was_exported_comes_back(converted, config, tmp_path):
  whole.export(converted[0], tmp_path / "out")
  whole.convert(whole.paths_of(str(tmp_path / "out")), tmp_path / "back", config)
  whole.export(tmp_path / "back", tmp_path / "again")
  for name in ("local_model.safetensors", "global_model.safetensors", "vocab.json"):
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_it_is_evaluated_and_trained_further(converted, config, quick_compile):
  workdir, _ = converted
  words = Vocabulary.load(workdir / "vocab.json").words
  train.evaluate_run(config, workdir, "last")
  assert json.loads((workdir / "eval.json").read_text())["checkpoint_step"] == 0
  config = config.copy_and_resolve_references()
  train.train(config, workdir)
  assert json.loads((workdir / "eval.json").read_text())["checkpoint_step"] > 0
  assert Vocabulary.load(workdir / "vocab.json").words == words


@pytest.mark.parametrize("names", ["tirg", "clip4cir"])
def test_a_configuration_of_another_method_is_refused(names, tmp_path):
  with pytest.raises(UserError, match="its method is .* name a configuration with"):
    whole.convert([tmp_path / "local", tmp_path / "global"], tmp_path / "out",
                  default.get_config(names))  # fmt: skip


def test_files_that_do_not_belong_together_are_refused(modules, files, config, tmp_path):
  local = files / "local_model.pt"
  with pytest.raises(UserError, match="both are local models"):
    whole.convert([local, local], tmp_path / "out", config)
  module = modules["global"]
  words = module.text_model.vocab.word2id
  module.text_model.vocab.word2id = {**words, "new": len(words)}
  torch.save(module, tmp_path / "global.pt")
  module.text_model.vocab.word2id = words
  with pytest.raises(UserError, match="different vocabularies"):
    whole.convert([local, tmp_path / "global.pt"], tmp_path / "out", config)
  (tmp_path / "half").mkdir()
  (tmp_path / "half" / "local_model.pt").write_bytes(local.read_bytes())
  with pytest.raises(UserError, match="global_model.pt: not found; a whole model is two"):
    whole.paths_of(str(tmp_path / "half"))


def test_wrapped_models_are_the_same(modules, files, config, tmp_path):
  """DataParallel, whole and as a state dict in a checkpoint."""
  whole.convert(whole.paths_of(str(files)), tmp_path / "plain", config)
  whole.export(tmp_path / "plain", tmp_path / "expected")
  wrapped = {kind: torch.nn.DataParallel(module) for kind, module in modules.items()}
  words = {word: i for i, word in enumerate(WORDS)}
  for name, content in (
    ("whole", wrapped),
    ("states", {kind: {"net": module.state_dict()} for kind, module in wrapped.items()}),
  ):
    (tmp_path / name).mkdir()
    (tmp_path / name / "vocab.json").write_text(json.dumps(words))
    for kind in crn.BRANCHES:
      torch.save(content[kind], tmp_path / name / f"{kind}_model.pt")
    said = whole.convert(whole.paths_of(str(tmp_path / name)), tmp_path / "run", config, force=True)
    assert said.count("removed from the names: 'module.'") == 2
    assert said.count("taken from 'net'") == (0 if name == "whole" else 2)
    whole.export(tmp_path / "run", tmp_path / "out", force=True)
    for file in ("local_model.safetensors", "global_model.safetensors", "vocab.json"):
      assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_values_that_are_not_finite_are_named(converted, config, tmp_path):
  whole.export(converted[0], tmp_path / "out")
  path = tmp_path / "out" / "global_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  tensors["global_fc.bias"][2] = np.nan
  variance = next(name for name in tensors if name.endswith("running_var"))
  tensors[variance][0] = -1
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(UserError) as error:
    whole.convert(whole.paths_of(str(tmp_path / "out")), tmp_path / "back", config)
  assert "global_fc.bias holds 1 of 32 values that are not finite" in str(error.value)
  assert f"{variance} is a variance, and is negative in 1 places" in str(error.value)
  assert not (tmp_path / "back").exists()


def test_missing_tensors_are_named(converted, config, tmp_path):
  whole.export(converted[0], tmp_path / "out")
  path = tmp_path / "out" / "global_model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  del tensors["global_fc.bias"]
  tensors["extra"] = np.zeros(1, np.float32)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(UserError) as error:
    whole.convert(whole.paths_of(str(tmp_path / "out")), tmp_path / "back", config)
  assert "missing global_fc.bias" in str(error.value) and "unexpected extra" in str(error.value)
  assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("prefix", ["img_model.img_model.", "img_model."])
def test_clvc_net_comes_in_and_goes_out(tmp_path, prefix):
  """ResNet's names are found wherever they are; the relation, which it has not, stays ours."""
  config = default.get_config("clvc_net")
  config.model.backbone.update(width=8, depths=(1, 1))
  config.model.update(feature_dim=32, word_dim=16, pretrained="")
  config.data.update(image_size=32, max_words=8)
  shapes = jax.eval_shape(lambda: CRN(config, len(WORDS)).init(jax.random.key(0)))
  rng = np.random.default_rng(0)
  values = jax.tree.map(lambda x: rng.uniform(0.5, 1, x.shape).astype(np.float32), shapes)
  words = {word: i for i, word in enumerate(WORDS)}
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "vocab.json").write_text(json.dumps(words))
  given = {}
  for kind in crn.BRANCHES:
    tensors = {}
    for collection in values.values():
      tree = {k: v for k, v in collection[kind].items() if k != "relation"}
      tensors |= release.export_branch(kind, tree)
    given[kind] = tensors
    renamed = {n.replace("img_model.img_model.", prefix): t for n, t in tensors.items()}
    assert f"{prefix}layer2.0.downsample.1.running_var" in renamed
    renamed[f"{prefix}fc.weight"] = np.zeros((2, 64), np.float32)
    path = tmp_path / "in" / f"{kind}_model.safetensors"
    safetensors.numpy.save_file(renamed, path)
  said = whole.convert(whole.paths_of(str(tmp_path / "in")), tmp_path / "run", config)
  assert "left out (classifier): img_model.img_model.fc.weight" in said
  whole.export(tmp_path / "run", tmp_path / "out")
  for kind, tensors in given.items():
    found = safetensors.numpy.load_file(tmp_path / "out" / f"{kind}_model.safetensors")
    counters = {n.replace("running_mean", "num_batches_tracked") for n in tensors if "_mean" in n}
    assert found.keys() == tensors.keys() | counters
    for name, value in tensors.items():
      np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("kind", crn.BRANCHES)
def test_names_and_shapes_of_the_published_size(kind):
  """Every name of the release's Swin-L model, and nothing else."""
  facts = load_json(f"state_dict_{kind}.json")
  config = default.get_config("crn_released")
  shapes = jax.eval_shape(lambda: CRN(config, 35).init(jax.random.key(0)))
  found = {}
  for collection in shapes.values():
    found |= release.torch_shapes(kind, collection[kind])
  expected = {n: tuple(s) for n, s in facts["new_timm"].items() if "num_batches" not in n}
  assert found == expected
  old = {facts["renamed_in_old_timm"].get(n, n): s for n, s in facts["new_timm"].items()}
  old |= facts["extra_buffers_in_old_timm"]
  kept, left_out = recognise.split(dict.fromkeys(old), whole.LEFT_OUT)
  assert timm.modern_names(kept).keys() == expected.keys()
  assert set(left_out) == old.keys() - kept.keys() >= set(facts["extra_buffers_in_old_timm"])
