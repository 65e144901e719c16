"""Fashion200k: the release's lists and distribution of triplets on a tiny tree, bad input."""

import collections
import itertools
import json
import math
import pathlib
import shutil

import numpy as np
import pytest

from crn_jax.errors import UserError
from crn_jax.input_pipeline import images, loader
from crn_jax.input_pipeline.readers import fashion200k
from crn_jax.input_pipeline.tokenizers.words import Vocabulary

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"
MINI = GOLDENS / "mini_data" / "fashion200k"
LABELS = "labels/dress_train_detect_all.txt"
N_DRAWS = 4000


@pytest.fixture(scope="module")
def expected():
  """What the release's loader lists from the tiny tree."""
  return json.loads((GOLDENS / "datasets.json").read_text())["fashion200k"]


@pytest.fixture(scope="module")
def data():
  return fashion200k.read(MINI)


@pytest.fixture(scope="module")
def draws(data):
  """N_DRAWS epochs: [epochs, images] references, targets and texts."""
  epochs = [data.train.triplets.draw(0, epoch) for epoch in range(N_DRAWS)]
  return (
    np.stack([e.reference for e in epochs]),
    np.stack([e.target for e in epochs]),
    [[text for (text,) in e.texts] for e in epochs],
  )


@pytest.fixture
def root(tmp_path):
  """A copy of the tiny tree, to be changed."""
  return pathlib.Path(shutil.copytree(MINI, tmp_path / "data"))


def replace_line(root, name, number, line):
  lines = (root / name).read_text().splitlines()
  lines[number - 1] = line
  (root / name).write_text("\n".join(lines) + "\n")


def close(counts, probability, n):
  """Whether a binomial count is within five standard deviations: a false alarm in two million."""
  return abs(counts - n * probability) <= 5 * math.sqrt(n * probability * (1 - probability)) + 1e-9


def test_train_lists_what_the_release_lists(data, expected):
  facts = expected["train"]
  paths = [pathlib.Path(path).relative_to(MINI).as_posix() for path in data.train.image_paths]
  assert paths == [image["file"] for image in facts["images"]]
  assert list(data.train.captions) == expected["texts_for_vocab"]
  pairs = data.train.triplets
  assert len(pairs) == facts["length"]
  assert pairs.captions == tuple(facts["caption_to_images"])
  assert pairs.modifiable.tolist() == [
    i for i, image in enumerate(facts["images"]) if image["modifiable"]
  ]
  by_caption = np.split(pairs.images, pairs.images_start[1:-1])
  assert [rows.tolist() for rows in by_caption] == list(facts["caption_to_images"].values())
  families = [
    [pairs.captions[i] for i in rows]
    for rows in np.split(pairs.children, pairs.children_start[1:-1])
  ]
  assert families == [f for f in facts["parent_to_children"].values() if len(f) > 1]
  n_parents = np.diff(pairs.parents_start)[pairs.caption_of]
  assert n_parents.tolist() == [len(image["parent_captions"]) for image in facts["images"]]


def test_parents_are_those_of_the_release(expected):
  children = collections.defaultdict(list)
  for caption in expected["train"]["caption_to_images"]:
    for parent in fashion200k.parent_captions(caption):
      children[parent].append(caption)
  assert children == expected["train"]["parent_to_children"]
  assert list(children) == list(expected["train"]["parent_to_children"])


def test_texts_are_those_of_the_release(expected):
  for case in expected["different_word"]:
    assert fashion200k.modification_text(case["source"], case["target"]) == case["result"][2]


def test_every_draw_is_possible_and_has_its_text(draws, expected):
  possible = {
    (int(source), draw["target"], draw["text"])
    for source, found in expected["train"]["draws"].items()
    for draw in found
  }
  reference, target, texts = draws
  seen = set(
    zip(reference.ravel().tolist(), target.ravel().tolist(), itertools.chain(*texts), strict=True)
  )
  assert seen == possible


def test_draws_have_the_probabilities_of_the_release(draws, expected):
  reference, target, _ = draws
  for source, found in expected["train"]["draws"].items():
    assert (reference[:, int(source)] == int(source)).all()
    for draw in found:
      count = (target[:, int(source)] == draw["target"]).sum()
      assert close(count, draw["probability"], N_DRAWS), (source, draw, count)


def test_images_that_are_not_modifiable_are_replaced_uniformly(draws, expected):
  sources = expected["train"]["replacement_sources_for_non_modifiable"]
  for item in expected["train"]["non_modifiable"]:
    counts = np.bincount(draws[0][:, item], minlength=15)
    assert np.flatnonzero(counts).tolist() == sources
    assert all(close(counts[s], 1 / len(sources), N_DRAWS) for s in sources), counts


def test_a_draw_is_a_function_of_seed_and_epoch(data):
  def rows(seed, epoch):
    triplets = data.train.triplets.draw(seed, epoch)
    return [*triplets.reference.tolist(), *triplets.target.tolist()]

  assert rows(1, 2) == rows(1, 2)
  assert len({tuple(rows(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_unequal_families_are_drawn_as_by_rejection():
  # Families of sizes 2 and 3: the parent of three is kept more often, 2/3 against 1/2.
  pairs = fashion200k.CaptionPairs.create(["a b", "a c", "d b", "e b", "e b"])
  n = 20_000
  children = [pairs.draw(0, epoch).target[0] for epoch in range(n)]
  counts = np.bincount(children, minlength=5)
  for image, probability in ((1, 3 / 7), (2, 2 / 7), (3, 1 / 7), (4, 1 / 7)):
    assert close(counts[image], probability, n), counts


def test_queries_and_groups_are_those_of_the_release(data, expected):
  (split,) = data.evals
  captions = [image["caption"] for image in expected["test"]["images"]]
  assert list(split.image_ids) == [image["file"] for image in expected["test"]["images"]]
  assert split.galleries["test_images"].tolist() == list(range(len(captions)))
  assert [[a == b for a in captions] for b in captions] == (
    split.groups[:, None] == split.groups
  ).tolist()
  found = [
    {
      "source_img_id": int(r),
      "source_caption": captions[r],
      "target_caption": captions[t],
      "text": text,
    }
    for r, t, (text,) in zip(
      split.queries.reference, split.queries.target, split.queries.texts, strict=True
    )
  ]
  assert found == expected["queries"]


SETTINGS = {
  "batch_size": 4, "sizing": images.Sizing(8, 8, "bilinear"), "augmentation": "none", "seed": 3,
  "num_steps": 9,
}  # fmt: skip


def batches(data, **changes):
  words = Vocabulary.build(["replace with", *data.train.captions], markers="words", max_words=5)
  return list(loader.train_batches(data.train, words, **(SETTINGS | changes)))


def test_every_process_and_a_resumed_run_read_the_same_draws(data):
  whole = batches(data)  # Three steps an epoch; the last three images of each order are dropped.
  for start in (1, 4):
    for batch, other in zip(batches(data, start_step=start), whole[start:], strict=True):
      for key, value in batch.items():
        np.testing.assert_array_equal(value, other[key])
  parts = [batches(data, process_index=i, process_count=2) for i in range(2)]
  for first, second, batch in zip(*parts, whole, strict=True):
    for key, value in batch.items():
      np.testing.assert_array_equal(np.concatenate([first[key], second[key]]), value)
  words = Vocabulary.build(["replace with", *data.train.captions], markers="words", max_words=5)
  for epoch in range(3):
    texts = data.train.triplets.draw(3, epoch).texts
    order = loader.epoch_order(15, 3, epoch)[:12]
    tokens = np.concatenate([b["tokens"] for b in whole[3 * epoch : 3 * epoch + 3]])
    np.testing.assert_array_equal(tokens, words.encode_all([texts[i] for i in order])[0])


# Bad input.


def test_missing_folders_and_files_are_named(root, tmp_path):
  with pytest.raises(UserError, match="nowhere: no such folder; expected a Fashion200k"):
    fashion200k.read(tmp_path / "nowhere")
  (root / "test_queries.txt").unlink()
  for path in (root / "labels").glob("*train*"):
    path.unlink()
  with pytest.raises(UserError, match=r"(?s)labels/\*train\*.*test_queries\.txt: no such file"):
    fashion200k.read(root, on_missing="skip")
  shutil.rmtree(root / "labels")
  with pytest.raises(UserError, match="labels: cannot be listed"):
    fashion200k.read(root)


@pytest.mark.parametrize(
  "line, message",
  [
    ("women/dresses/x.jpeg 0.9 red dress", "expected path, score and caption with tabs between"),
    ("women/dresses/x.jpeg\tred dress", "expected path, score and caption with tabs between"),
    ("../x.jpeg\t0.9\tred dress", "leads outside the data folder"),
    ("/etc/x.jpeg\t0.9\tred dress", "leads outside the data folder"),
    ("women/../../x.jpeg\t0.9\tred dress", "leads outside the data folder"),
  ],
)
def test_bad_label_lines_are_named_with_their_number_and_can_be_skipped(root, line, message):
  replace_line(root, LABELS, 2, line)
  with pytest.raises(UserError, match=f"(?s){LABELS}, line 2: .*{message}"):
    fashion200k.read(root)
  data = fashion200k.read(root, on_missing="skip")
  assert len(data.train.triplets) == 14
  assert (data.skipped["train"]["triplets"], data.skipped["train"]["of_triplets"]) == (1, 15)


def test_queries_of_unknown_images_and_of_another_shape_are_named(root):
  replace_line(root, "test_queries.txt", 1, "women/unknown.jpeg women/dresses/gowns/302/302_0.jpeg")
  replace_line(root, "test_queries.txt", 2, "women/dresses/gowns/302/302_0.jpeg")
  with pytest.raises(UserError) as error:
    fashion200k.read(root)
  assert "test_queries.txt, line 1: women/unknown.jpeg not in the labels of test" in str(
    error.value
  )
  assert "test_queries.txt, line 2: expected a reference and a target path" in str(error.value)
  data = fashion200k.read(root, on_missing="skip")
  counts = data.skipped["val"]["fashion200k"]
  assert (counts["queries"], counts["of_queries"], counts["test_images"]) == (2, 6, 0)
  assert len(data.evals[0].queries) == 4


@pytest.mark.parametrize("spoil", ["missing", "empty", "truncated"])
def test_images_that_cannot_be_read_are_left_out_and_counted(root, spoil):
  for name in ("dresses/casual_dresses/101/101_0.jpeg", "dresses/gowns/302/302_0.jpeg"):
    path = root / "women" / name
    content = path.read_bytes()
    path.unlink()
    if spoil != "missing":
      path.write_bytes(content[: 0 if spoil == "empty" else len(content) // 2])
  with pytest.raises(UserError, match=r"(?s)101_0\.jpeg.*302_0\.jpeg"):
    fashion200k.read(root)
  data = fashion200k.read(root, on_missing="skip")
  assert len(data.train.triplets) == len(data.train.image_paths) == 14
  assert len(data.train.captions) == 15
  counts = data.skipped["val"]["fashion200k"]
  assert (counts["queries"], counts["test_images"], counts["of_test_images"]) == (3, 1, 7)
  rows = data.train.triplets.draw(0, 0)
  assert max(rows.reference.max(), rows.target.max()) < 14


def test_line_ends_and_repeated_paths_do_not_change_the_data(root, data):
  for path in root.rglob("*.txt"):
    lines = path.read_text().splitlines()
    path.write_bytes("\r\n".join([*lines, lines[-1] if "train" in path.name else ""]).encode())
  again = fashion200k.read(root)
  assert again.train.captions == data.train.captions
  assert again.evals[0].queries.texts == data.evals[0].queries.texts
  assert again.remarks == ("labels of train: 2 repeated image paths, each counts once",)


def test_captions_may_be_empty_or_of_any_letters(root):
  replace_line(root, LABELS, 1, "women/dresses/casual_dresses/101/101_0.jpeg\t0.9\t")
  replace_line(root, LABELS, 2, "women/dresses/casual_dresses/101/101_1.jpeg\t0.9\tblåck dress")
  triplets = fashion200k.read(root).train.triplets
  assert triplets.captions[:2] == ("", "blåck dress")
  assert 0 not in triplets.modifiable
  draw = triplets.draw(0, 0)
  assert 0 not in draw.reference and 0 not in draw.target


def test_captions_without_pairs_end_the_reading(root):
  for path in (root / "labels").glob("*train*"):
    path.unlink()
  line = "women/dresses/gowns/106/106_0.jpeg\t0.3\tunique gown\n"
  (root / "labels/one_train.txt").write_text(line)
  with pytest.raises(UserError, match="no two captions differ in one word"):
    fashion200k.read(root, on_missing="skip")
