"""Shoes and Fashion200k from the folder to the report, with made-up vectors; prepare."""

import html
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from configs import default, fashion200k, shoes
from crn_jax import evaluate
from crn_jax.errors import UserError
from crn_jax.input_pipeline import prepare, registry
from crn_jax.input_pipeline.dataset import EvalSplit, Triplets
from crn_jax.input_pipeline.remarks import remarks
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.methods.crn import join
from crn_jax.reports import cases, report, tables
from crn_jax.retrieval import ranking
from crn_jax.retrieval.encode import Encoded, picture_sizing
from tests import made_up

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
MINI = GOLDENS / "mini_data"
PUBLISHED = {"shoes": shoes, "fashion200k": fashion200k}


def config(name, root=None):
  """The published configuration on tiny images."""
  c = PUBLISHED[name].get_config()
  c.data.root = str(root or MINI / name)
  c.data.image_size = c.data.resize = 32
  c.batch_size = 8
  c.eval.recall_at = (1, 7, 10)
  return c


@pytest.mark.parametrize("name", PUBLISHED)
def test_results_and_pictures_name_the_protocol(name, tmp_path):
  c = config(name)
  data = registry.open_dataset(c.data, train=False)
  found = made_up.evaluation(c, data)
  protocol = c.eval.best_metric.partition("/")[0]
  summary = found.results.summary
  recalls = summary.protocols[protocol]
  gallery, n_queries = {"shoes": (7, 10), "fashion200k": (7, 6)}[name]
  assert (found.results.dataset, summary.n_queries) == (name, n_queries)
  assert list(summary.protocols) == [protocol]
  assert found.results.captions == "single"
  assert recalls.counts["gallery"] == gallery
  # Seven images: all targets that are among them are among the first seven, the others nowhere.
  assert recalls.percent["R@7"] == {"shoes": 90, "fashion200k": 100}[name]
  sentence = f"{protocol} ranks {registry.protocols()[protocol]}."
  assert sentence in tables.results_as_text(found.results)
  shown = made_up.cases(c, data, found)
  report.write(c, tmp_path, found.results, found.outcomes, shown, made_up.vocabulary(c))
  assert sentence in html.unescape((tmp_path / "report.html").read_text())
  (split,) = data.evals
  assert report.title(split, protocol, found.results).startswith(f"{name}: {protocol}, gallery 7")
  rows = shown[0].grid_rows("all")
  # The excluded reference is not shown, though it is all that the top ten have room for.
  assert all(path != row.reference for row in rows for path, _ in row.top)
  with Image.open(tmp_path / "pictures" / f"retrieval_{name}.png") as picture:
    assert picture.width > 1000


@pytest.fixture(scope="module")
def golden():
  """The release's metric of Fashion200k on random features."""
  with np.load(GOLDENS / "recall.npz") as data:
    return {k.removeprefix("f200k."): data[k] for k in data.files if k.startswith("f200k.")}


def test_any_image_of_the_targets_caption_is_a_hit(golden):
  captions, wanted = golden["gallery_captions"], golden["target_captions"]
  # Targets by caption: any row of it, or a row outside the gallery where no image has it.
  groups = np.concatenate([captions, wanted]).astype(np.int32)
  n, q = len(captions), len(wanted)
  split = EvalSplit(
    name="fashion200k",
    image_ids=tuple(map(str, range(n + q))),
    image_paths=tuple(map(str, range(n + q))),
    queries=Triplets(golden["source_index"], n + np.arange(q), (("x",),) * q),
    galleries={"test_images": np.arange(n)},
    groups=groups,
  )
  gallery = join(golden["gallery_local"], golden["gallery_global"])
  queries = join(golden["query_local"], golden["query_global"])
  c = default.get_config()
  c.eval.best_metric = "test_images/R@10"
  images = np.concatenate([gallery, np.zeros((q, gallery.shape[1]), np.float32)])
  encoded = Encoded(images, queries, queries)
  ranks = {"fashion200k": evaluate.find(encoded, split, c)}
  found = evaluate.summarize([split], ranks, c).protocols["test_images"].percent
  expected = 100 * golden["values"]  # The release reports fractions.
  np.testing.assert_allclose([found[f"R@{k}"] for k in (1, 10, 50)], expected, rtol=1e-12)
  composed = ranks["fashion200k"]["test_images"]["composed"].ranks
  hits = captions[golden["ranking"]] == wanted[:, None]
  first = np.where(hits.any(axis=1), hits.argmax(axis=1), n)
  inside = first < hits.shape[1]
  np.testing.assert_array_equal(composed[inside], first[inside])
  # The grid frames the same image.
  exclude = evaluate.excluded_positions(split, "test_images", c)
  positions, scores = ranking.top_k(queries, np.asarray(gallery), 10, exclude)
  rows = cases.Cases(
    split, "test_images", composed, {"all": np.arange(q)}, np.arange(0),
    picture_sizing(made_up.Encoder(c).method),
    top={i: list(zip(positions[i], scores[i], strict=True)) for i in range(q)},
  ).grid_rows("all")  # fmt: skip
  assert [r.target_position for r in rows] == [f if f < 10 else None for f in first.tolist()]
  assert [r.rank is None for r in rows] == (~np.isin(wanted, captions)).tolist()


def test_prepare_reports_what_there_is(tmp_path):
  assert prepare.prepare(config("shoes")) == (
    "shoes: training can start.\n"
    "train: 10 triplets an epoch, 8 images, 25 words\n"
    "shoes: 10 queries, 7 images in the gallery eval_list\n"
    "shoes: 1 of 10 queries have their target outside eval_list and are misses\n"
    "nothing was left out"
  )
  root = pathlib.Path(shutil.copytree(MINI / "fashion200k", tmp_path / "data"))
  labels = root / "labels/dress_train_detect_all.txt"
  first = labels.read_text().splitlines()[0]
  labels.write_text(labels.read_text() + first + "\n")
  (root / "women/dresses/gowns/106/106_0.jpeg").unlink()
  c = config("fashion200k", root)
  with pytest.raises(UserError, match=r"106_0\.jpeg(?s:.*)skipped in train: 1 of 15 triplets"):
    prepare.prepare(c)
  c.data.on_missing = "skip"
  c.data.max_words = 5
  report = prepare.prepare(c)
  assert "train: 14 triplets an epoch, 14 images" in report
  assert "fashion200k: 6 of 6 texts are longer than data.max_words = 5 and are cut" in report
  assert "labels of train: 1 repeated image paths, each counts once" in report
  assert "skipped in train: 1 of 15 triplets" in report
  # Too few for a batch: the report warns, and says the rest as before.
  c.batch_size = 15
  first, *rest = prepare.prepare(c).splitlines()
  assert first.startswith("fashion200k: training cannot start: batch_size: expected 1 .. 14")
  assert rest == report.splitlines()[1:]


def test_texts_without_words_are_counted(tmp_path):
  root = pathlib.Path(shutil.copytree(MINI / "shoes", tmp_path / "data"))
  path = root / "relative_captions_shoes.json"
  items = json.loads(path.read_text())
  items[0]["RelativeCaption"] = "!?"
  path.write_text(json.dumps(items))
  assert "train: 2 of 10 texts have no word" in prepare.prepare(config("shoes", root))


def test_captions_of_other_letters_are_remarked_without_preparing(tmp_path):
  root = pathlib.Path(shutil.copytree(MINI / "shoes", tmp_path / "data"))
  path = root / "relative_captions_shoes.json"
  items = json.loads(path.read_text())
  for item in items:
    item["RelativeCaption"] = "更长的靴子"
  path.write_text(json.dumps(items))
  c = config("shoes", root)
  dataset = registry.open_dataset(c.data, train=True)
  vocabulary = Vocabulary.build(
    dataset.train.captions, markers=c.data.markers, max_words=c.data.max_words
  )
  found = remarks(dataset, vocabulary, c.seed)
  assert found[0].startswith("train: 10 of 10 texts have no word (")
  assert found[1] == ("train: 10 of 10 texts have letters other than a to z, which are dropped")
  assert found[2].startswith("shoes: 10 of 10 texts have no word (")
  for line in found:
    assert line in prepare.prepare(c)
  without = registry.open_dataset(c.data, train=False)
  assert remarks(without, vocabulary, c.seed) == found[2:]


def test_conversions_of_images_are_reported(tmp_path):
  root = pathlib.Path(shutil.copytree(MINI / "shoes", tmp_path / "data"))
  assert "converted" not in prepare.prepare(config("shoes", root))
  (split,) = registry.open_dataset(config("shoes", root).data, train=False).evals
  paths = split.image_paths
  for path in paths[:2]:
    Image.new("RGBA", (40, 40)).save(path, "PNG")
  Image.fromarray(np.zeros((40, 40), np.uint16)).save(paths[2], "PNG")
  Image.new("CMYK", (40, 40)).save(paths[3])
  Image.new("L", (40, 40)).save(paths[4])  # Grey stays as it is.
  assert (
    "\nimage files converted to 8-bit RGB, transparent parts to white: 2 of mode RGBA with "
    "transparency, 1 of mode CMYK, 1 of mode I;16 (16 bits)\n"
  ) in prepare.prepare(config("shoes", root))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
  c = PUBLISHED[name].get_config()
  expected = {
    "shoes": (6195, 50, 16, 3e-5, 30, 256),
    "fashion200k": (6195, 40, 16, 3e-5, 40, 224),
  }[name]
  rate, last = c.optimizer.learning_rate, c.optimizer.max_decay_epoch
  assert (c.seed, c.num_epochs, c.batch_size, rate, last, c.data.resize) == expected
  assert (c.data.augment, c.data.image_size, c.data.shoes_pairs) == ("none", 224, "released")
