"""zero_shot: its queries, and its evaluation from a folder of weights to the report."""

import functools
import html
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from configs import zero_shot as configs
from crn_jax import configuration, pretrained, state, train
from crn_jax.convert import backbone
from crn_jax.errors import UserError
from crn_jax.input_pipeline import registry
from crn_jax.input_pipeline.demo import reader
from crn_jax.methods import registry as methods
from crn_jax.methods import zero_shot
from crn_jax.parallel import AXIS, DataParallel
from crn_jax.retrieval.encode import Encoder
from tests import small_towers, tiny
from tests.torch_models import torch, torchvision, transformers

transforms = torchvision.transforms.functional
MINI = pathlib.Path(__file__).parents[1] / "goldens" / "mini_data"
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """family -> folder of converted towers; and the models."""
  folder = tmp_path_factory.mktemp("towers")
  models = {family: small_towers.save(family, folder / family) for family in ("clip", "siglip")}
  for family in models:
    backbone.convert(folder / family, folder / f"{family}_converted")
  return {family: str(folder / f"{family}_converted") for family in models}, models


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
  return tiny.draw(tmp_path_factory.mktemp("demo"))


def config_of(folder, name, root, **fields):
  c = configs.get_config(name)
  c.model.pretrained = folder
  c.data.root = str(root)
  c.eval.batch_size = 16
  c.update_from_flattened_dict(fields)
  c.lock()  # As main.py has it.
  pretrained.describe(c)
  return c


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_sum_adds_what_the_towers_give():
  rng = np.random.default_rng(0)
  image, text = 5 * rng.normal(size=(4, 7)), rng.normal(size=(4, 7))
  query = {name: np.asarray(f(image, text, 0.5)) for name, f in zero_shot.QUERIES.items()}
  np.testing.assert_allclose(query["sum"], unit(image + text), atol=1e-6)
  np.testing.assert_allclose(query["image"], unit(image), atol=1e-6)
  np.testing.assert_allclose(query["text"], unit(text), atol=1e-6)
  # Half way along the arc is the direction of the sum of the unit vectors.
  np.testing.assert_allclose(query["slerp"], unit(unit(image) + unit(text)), atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_slerp_divides_the_angle(weight):
  rng = np.random.default_rng(1)
  image, text = unit(rng.normal(size=(2, 5, 6)).astype(np.float32))
  found = np.asarray(zero_shot.slerp(image, text, weight))
  angle = np.arccos(np.sum(image * text, -1))
  np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, atol=1e-6)
  # arccos magnifies rounding near one, where its slope is 1 / sin.
  cosines = np.cos(weight * angle), np.cos((1 - weight) * angle)
  np.testing.assert_allclose(np.sum(found * image, -1), cosines[0], atol=1e-6)
  np.testing.assert_allclose(np.sum(found * text, -1), cosines[1], atol=1e-6)


def test_slerp_of_equal_vectors_is_that_vector():
  x = unit(np.random.default_rng(2).normal(size=(3, 6)).astype(np.float32))
  np.testing.assert_allclose(zero_shot.slerp(x, x, 0.3), x, atol=1e-6)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_vectors_of_a_split_are_those_of_transformers(family, weights):
  """From files of elongated pictures on. CLIP's are cropped as by torchvision, which its authors
  used; transformers rounds margins of half a pixel down."""
  folders, models = weights
  config = config_of(folders[family], "fashioniq_dress", MINI / "fashioniq")
  vocabulary = pretrained.new_tokenizer(config, ())
  method = methods.create(config, len(vocabulary), AXIS)
  parallel = DataParallel.create(config.parallel.mode)
  (split,) = registry.open_dataset(config.data, train=False).evals
  variables = parallel.replicate(state.initial_variables(method, method.config.model.pretrained))
  found = Encoder.create(method, parallel).encode(variables, split, vocabulary)
  side = config.data.image_size
  assert side == 23
  opened = [Image.open(path).convert("RGB") for path in split.image_paths]
  assert len({picture.size for picture in opened}) > 1
  if family == "siglip":
    processor = transformers.SiglipImageProcessorPil(**small_towers.preprocessing(family))
    given = processor(opened, return_tensors="pt")["pixel_values"]
  else:
    bicubic = transforms.InterpolationMode.BICUBIC
    given = torch.stack([
      transforms.normalize(
        transforms.to_tensor(transforms.center_crop(transforms.resize(p, side, bicubic), side)),
        small_towers.MEAN, small_towers.STD,
      )
      for p in opened
    ])  # fmt: skip
  ids, _ = vocabulary.encode_all(split.queries.texts)
  model = models[family]
  with torch.no_grad():
    image = model.get_image_features(given).pooler_output.numpy()
    text = model.get_text_features(torch.from_numpy(ids).long()).pooler_output.numpy()
  # The towers' vectors are equal to 1e-5, and not shorter than one.
  assert min(np.linalg.norm(v, axis=-1).min() for v in (image, text)) > 1
  np.testing.assert_allclose(found.images, unit(image), atol=2e-5)
  np.testing.assert_allclose(found.text_only, unit(text), atol=2e-5)
  composed = image[split.queries.reference] + text
  # A sum of two, and at least a quarter long.
  assert np.linalg.norm(composed, axis=-1).min() > 0.25
  np.testing.assert_allclose(found.composed, unit(composed), atol=2e-5 / 0.25)


@pytest.mark.parametrize("query", zero_shot.QUERIES)
def test_each_query_is_evaluated(query, weights, drawn, tmp_path):
  config = config_of(weights[0]["clip"], "fashioniq_dress", drawn, **{"zero_shot.query": query})
  shown = train.evaluate_run(config, tmp_path, "best")
  assert "Evaluated: the pretrained weights, without any training" in shown
  results = json.loads((tmp_path / "eval.json").read_text())
  kinds = results["by_query"]
  if query in ("image", "text"):
    assert kinds["composed"] == kinds[f"{query}_only"]
  else:
    assert kinds["composed"] != kinds["image_only"] != kinds["text_only"]


ROOTS = {"fashioniq_all": "fashioniq", "shoes": "shoes", "fashion200k": "fashion200k"}


@pytest.mark.parametrize("name", [*ROOTS, "demo"])
def test_every_data_set_is_evaluated_up_to_its_report(name, weights, tmp_path, monkeypatch):
  small = functools.partial(
    reader.generate.generate, image_size=32, n_train_images=40, n_train_triplets=40,
    n_val_images=40, n_val_queries=30,
  )  # fmt: skip
  monkeypatch.setattr(reader.generate, "generate", small)
  root = tmp_path / "data" if name == "demo" else MINI / ROOTS[name]
  config = config_of(weights[0]["siglip"], name, root)
  shown = train.evaluate_run(config, tmp_path, "last")
  results = json.loads((tmp_path / "eval.json").read_text())
  assert (results["selection"], results["checkpoint_step"]) == ("untrained", 0)
  page = html.unescape((tmp_path / "report.html").read_text())
  assert "the pretrained weights, without any training" in page
  assert str(tmp_path / "report.html") in shown
  assert not (tmp_path / "checkpoints").exists()
  assert any((tmp_path / "pictures").glob("retrieval_*.png"))


def test_the_towers_own_sizes_fill_what_is_not_set(weights, drawn):
  config = config_of(weights[0]["siglip"], "fashioniq_dress", drawn)
  assert (config.data.image_size, config.data.resize, config.data.max_words) == (23, 23, 13)
  larger = config_of(weights[0]["siglip"], "fashioniq_dress", drawn, **{"data.image_size": 36})
  assert (larger.data.image_size, larger.data.resize) == (36, 36)
  configuration.check(larger)
  method = methods.create(larger, 350)
  table = state.initial_variables(method, method.config.model.pretrained)["params"]["zero_shot"][
    "encoder"
  ]["image"]["position_embedding"]
  assert table.shape == (49, 24)


def test_training_is_refused_before_anything_is_written(weights, drawn, tmp_path):
  config = config_of(weights[0]["clip"], "fashioniq_dress", drawn)
  with pytest.raises(UserError, match="'zero_shot': there is nothing to train; .*--mode=eval"):
    train.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_run_that_was_trained_is_not_overwritten(weights, drawn, tmp_path):
  (tmp_path / "checkpoints" / "5").mkdir(parents=True)
  config = config_of(weights[0]["clip"], "fashioniq_dress", drawn)
  with pytest.raises(UserError, match="holds a trained run; choose another --workdir"):
    train.evaluate_run(config, tmp_path, "best")


def test_folders_that_do_not_fit_are_refused(weights, drawn, tmp_path):
  folders, _ = weights
  for folder, message in (
    ("", "model.pretrained: this method works on pretrained towers"),
    (str(tmp_path / "none"), "not found. Make the folder with"),
    (str(tmp_path), "not a folder of .*weights written by convert_torch_weights.py"),
  ):
    with pytest.raises(UserError, match=message):
      config_of(folder, "fashioniq_dress", drawn)
  old = config_of(folders["siglip"], "fashioniq_dress", drawn)
  state.check_pretrained(old)
  with old.unlocked():
    del old.model.encoder["squeeze"]  # As a run that was begun before squeezing was known.
  with pytest.raises(UserError, match="want pictures squeezed into squares, .* they are cropped"):
    state.check_pretrained(old)
  config = config_of(folders["clip"], "fashioniq_dress", drawn)
  config.model.pretrained = folders["siglip"]
  with pytest.raises(UserError, match="holds other weights than the towers of this configuration"):
    state.check_pretrained(config)
  c = tiny.config(drawn)
  c.model.pretrained = folders["clip"]
  with pytest.raises(UserError, match="holds a pair of towers, .*'crn' wants a backbone"):
    state.check_pretrained(c)


@pytest.mark.parametrize(
  ("family", "words", "message"),
  [("clip", 78, "expected 77 or less"), ("siglip", 14, "expected 13, as"),
   ("siglip", 12, "expected 13, as")],
)  # fmt: skip
def test_texts_longer_than_the_towers_positions_are_refused(family, words, message, weights, drawn):
  config = config_of(weights[0][family], "fashioniq_dress", drawn, **{"data.max_words": words})
  with pytest.raises(UserError, match=f"data.max_words = {words}: {message}"):
    methods.create(config, 350)


def test_a_tokenizer_with_more_ids_than_the_towers_is_refused(weights, drawn):
  config = config_of(weights[0]["clip"], "fashioniq_dress", drawn)
  config.model.encoder.text.vocab_size = 300
  with pytest.raises(UserError, match="a tokenizer of 350 ids for towers with 300"):
    pretrained.new_tokenizer(config, ())


def test_texts_that_are_cut_are_remarked(weights, drawn, tmp_path, capsys):
  train.evaluate_run(config_of(weights[0]["siglip"], "fashioniq_dress", drawn), tmp_path, "best")
  assert "texts are longer than data.max_words = 13 and are cut" in capsys.readouterr().out


def test_half_precision_changes_little(weights, drawn, tmp_path):
  """bfloat16 keeps eight bits, and vectors come out of some ten layers."""
  found = {}
  for dtype in ("float32", "bfloat16"):
    config = config_of(weights[0]["clip"], "fashioniq_dress", drawn, **{"model.dtype": dtype})
    method = methods.create(config, 350)
    variables = state.initial_variables(method, method.config.model.pretrained)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    pictures = np.random.default_rng(0).normal(size=(4, 23, 23, 3)).astype(np.float32)
    encode = jax.jit(method.encode_images)
    found[dtype] = encode(variables, pictures)[1]
    assert found[dtype].dtype == np.float32
    lowered = str(jax.make_jaxpr(method.encode_images)(variables, pictures))
    # The softmax of attention is taken in float32 whatever the rest is.
    assert " exp " in lowered
    assert not [line for line in lowered.splitlines() if " exp " in line and ":bf16" in line]
  assert 0 < np.abs(found["float32"] - found["bfloat16"]).max() < 0.05


@pytest.mark.slow
def test_from_a_hugging_face_folder_to_the_report_by_the_programs_alone(drawn, tmp_path):
  small_towers.save("clip", tmp_path / "huggingface")

  def run(program, *arguments):
    command = [sys.executable, ROOT / program, *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

  done = run("convert_torch_weights.py", "--input=huggingface", "--output=weights/clip")
  assert done.returncode == 0, done.stderr
  common = (
    f"--config={ROOT / 'configs/zero_shot.py'}:fashioniq_dress", f"--config.data.root={drawn}",
    "--config.eval.batch_size=16", "--config.model.pretrained=weights/clip",
  )  # fmt: skip
  done = run("main.py", *common, "--mode=eval")
  assert done.returncode == 0, done.stderr
  assert "Evaluated: the pretrained weights, without any training" in done.stdout
  assert (tmp_path / "runs" / "zero_shot_fashioniq_dress" / "report.html").exists()
  done = run("main.py", *common)
  assert done.returncode == 1
  assert done.stderr.strip().endswith(
    "error: method 'zero_shot': there is nothing to train; evaluate it with --mode=eval"
  )
