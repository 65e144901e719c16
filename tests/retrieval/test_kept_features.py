"""Features on disk: computed once, in pieces, and again where something changed."""

import json
import os

import numpy as np
import pytest

from crn_jax.errors import UserError
from crn_jax.retrieval import kept_features
from crn_jax.retrieval.kept_features import KeptFeatures

FACTS = {"weights": "abc", "image_size": 32}
WIDTH = 3
KEYS = [f"image {i}" for i in range(25)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(kept_features, "CHUNK", 10)


class Computing:
  """Computes the feature of thing i as [i, i, i]; notes what it was asked for."""

  def __init__(self, stop_at: int = 10**9):
    self.asked, self.stop_at = [], stop_at

  def __call__(self, first, last):
    if first >= self.stop_at:
      raise KeyboardInterrupt
    self.asked.append((first, last))
    return np.repeat(np.arange(first, last, dtype=np.float32)[:, None], WIDTH, axis=1)


def rows(folder, computing, keys=KEYS, facts=FACTS):
  return KeptFeatures.of(folder, facts, WIDTH).rows("image", keys, computing, "train")


EXPECTED = np.repeat(np.arange(25, dtype=np.float32)[:, None], WIDTH, axis=1)


def test_features_are_computed_once(tmp_path):
  first, second = Computing(), Computing()
  np.testing.assert_array_equal(rows(tmp_path, first), EXPECTED)
  np.testing.assert_array_equal(rows(tmp_path, second), EXPECTED)
  assert first.asked == [(0, 10), (10, 20), (20, 25)]
  assert second.asked == []


def test_an_interruption_costs_one_chunk(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    rows(tmp_path, Computing(stop_at=20))
  again = Computing()
  np.testing.assert_array_equal(rows(tmp_path, again), EXPECTED)
  assert again.asked == [(20, 25)]
  assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("changed", [{"weights": "abd"}, {"image_size": 64}])
def test_other_weights_or_pictures_have_features_of_their_own(tmp_path, changed):
  rows(tmp_path, Computing())
  again = Computing()
  rows(tmp_path, again, facts=FACTS | changed)
  assert len(again.asked) == 3
  back = Computing()
  rows(tmp_path, back)
  assert back.asked == []


def test_a_changed_image_is_computed_again_with_its_chunk(tmp_path):
  rows(tmp_path, Computing())
  again = Computing()
  rows(tmp_path, again, keys=[*KEYS[:12], "another", *KEYS[13:]])
  assert again.asked == [(10, 20)]


@pytest.mark.parametrize("content", [b"", b"no array", b"half"])
def test_a_damaged_chunk_is_computed_again(tmp_path, content):
  rows(tmp_path, Computing())
  path = sorted(tmp_path.rglob("*.npy"))[0]
  path.write_bytes(path.read_bytes()[:-5] if content == b"half" else content)
  again = Computing()
  np.testing.assert_array_equal(rows(tmp_path, again), EXPECTED)
  assert len(again.asked) == 1


def test_the_folder_says_what_made_it(tmp_path):
  rows(tmp_path, Computing())
  (path,) = tmp_path.rglob("made_by.json")
  assert json.loads(path.read_text()) == FACTS
  path.write_text("{}")
  with pytest.raises(UserError, match="is not as it was written; remove .*data.features"):
    rows(tmp_path, Computing())


def test_an_image_file_that_changes_has_another_key(tmp_path):
  path = tmp_path / "a.jpg"
  path.write_bytes(b"1")
  before = kept_features.image_key(str(path))
  assert kept_features.image_key(str(path)) == before
  path.write_bytes(b"22")
  longer = kept_features.image_key(str(path))
  os.utime(path, ns=(1, 1))
  assert len({before, longer, kept_features.image_key(str(path))}) == 3


def test_the_digest_sees_every_bit_name_and_shape():
  tree = {"a": {"w": np.arange(6, dtype=np.float32)}, "b": np.float32(1)}
  other = [
    {"a": {"w": np.arange(6, dtype=np.float32)}, "c": np.float32(1)},
    {"a": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.float32(1)},
    {"a": {"w": np.nextafter(np.arange(6, dtype=np.float32), 9)}, "b": np.float32(1)},
  ]
  digests = [kept_features.digest(t) for t in (tree, *other)]
  assert len(set(digests)) == 4
  assert kept_features.digest({"b": tree["b"], "a": tree["a"]}) == digests[0]
