"""Vocabulary: the release's words and ids on FashionIQ's captions, markers, padding, files."""

import gzip
import json
import pathlib
import zlib

import numpy as np
import pytest

from crn_jax.errors import UserError
from crn_jax.input_pipeline.tokenizers.words import (
  AND,
  BOS,
  EOS,
  RESERVED,
  UNK,
  Vocabulary,
  tokenize,
)

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"
CATEGORIES = ("dress", "shirt", "toptee")


def read_captions(category, split):
  path = GOLDENS / "fashion-iq" / "captions" / f"cap.{category}.{split}.json.gz"
  with gzip.open(path, "rt", encoding="utf-8") as f:
    return [tuple(entry["captions"]) for entry in json.load(f)]


@pytest.fixture(scope="module", params=CATEGORIES)
def real(request):
  """(expected facts, vocabulary of the train captions, captions per query and split)."""
  with open(GOLDENS / "vocab.json", encoding="utf-8") as f:
    expected = json.load(f)["categories"][request.param]
  pairs = {split: read_captions(request.param, split) for split in ("train", "val")}
  captions = [caption for pair in pairs["train"] for caption in pair]
  return expected, Vocabulary.build(captions, markers="words", max_words=32), pairs


def small(markers="tokens", max_words=8):
  return Vocabulary.build(
    ["is blue and long", "has a V-neck"], markers=markers, max_words=max_words
  )


def test_words_are_those_of_the_release(real):
  expected, vocabulary, _ = real
  assert len(vocabulary) == expected["vocab_size"]
  assert list(vocabulary.words[:20]) == expected["first20"]
  assert list(vocabulary.words[-20:]) == expected["last20"]
  assert zlib.crc32("\n".join(vocabulary.words).encode()) == expected["vocab_crc32"]
  assert vocabulary.words.index("and") == expected["id_of_and"]


def test_probes_have_the_tokens_and_ids_of_the_release(real):
  expected, vocabulary, _ = real
  for probe in expected["probes"]:
    assert tokenize(probe["text"]) == probe["tokens"]
    # The release fails on a text without words, here it is one unknown word.
    assert vocabulary.ids((probe["text"],)) == (probe["ids"] or [UNK]), probe["text"]


def test_joined_captions_have_the_ids_of_the_release(real):
  expected, vocabulary, pairs = real
  probes = {probe["text"]: probe["ids"] for probe in expected["probes"]}
  joined = {f"<BOS> {a} <AND> {b} <EOS>": (a, b) for split in pairs.values() for a, b in split}
  shared = probes.keys() & joined.keys()
  assert len(shared) >= 6
  for text in shared:
    assert vocabulary.ids(joined[text]) == probes[text]


def test_lengths_and_share_of_unknown_words_are_those_of_the_release(real):
  expected, vocabulary, pairs = real
  lengths = {split: max(len(vocabulary.ids(pair)) for pair in p) for split, p in pairs.items()}
  assert lengths == {"train": expected["max_len_train"], "val": expected["max_len_val"]}
  ids = [i for pair in pairs["val"] for i in vocabulary.ids(pair)]
  assert round(ids.count(UNK) / len(ids), 6) == expected["val_token_unknown_fraction"]


def test_tokens_mode_uses_the_reserved_ids():
  vocabulary = small()
  assert vocabulary.words[:4] == RESERVED
  assert vocabulary.words[4:] == ("is", "blue", "and", "long", "has", "a", "vneck")
  assert vocabulary.ids(("is blue", "long")) == [BOS, 4, 5, AND, 7, EOS]
  assert vocabulary.ids(("is blue",)) == [BOS, 4, 5, EOS]
  assert vocabulary.ids(("blue and red",)) == [BOS, 5, 6, UNK, EOS]
  assert vocabulary.ids(("", "")) == [BOS, AND, EOS]


def test_words_mode_loses_the_markers_as_the_release_does():
  vocabulary = small("words")
  assert vocabulary.ids(("is blue", "long")) == [UNK, 4, 5, 6, 7, UNK]
  assert vocabulary.ids(("is blue",)) == [4, 5]


def test_rows_are_padded_and_masked():
  ids, mask = small().encode(("is blue",))
  assert ids.dtype == np.int32 and mask.dtype == bool
  assert ids.tolist() == [BOS, 4, 5, EOS, 0, 0, 0, 0]
  assert mask.tolist() == [True] * 4 + [False] * 4


def test_text_without_words_is_one_unknown_word():
  ids, mask = small("words").encode(("!!!",))
  assert ids.tolist() == [UNK] * 8
  assert mask.tolist() == [True] + [False] * 7


@pytest.mark.parametrize(
  ("markers", "expected"), [("tokens", [BOS, 4, 5, 4, EOS]), ("words", [4, 5, 4, 5, 4])]
)
def test_long_text_is_cut_but_keeps_its_end_marker(markers, expected):
  vocabulary = small(markers, max_words=5)
  ids, mask = vocabulary.encode(("is blue " * 4,))
  assert ids.tolist() == expected
  assert mask.all()
  assert vocabulary.truncated_count([("is blue " * 4,), ("long",)]) == 1


def test_text_of_exactly_max_words_is_whole():
  vocabulary = small(max_words=4)
  assert vocabulary.encode(("is blue",))[0].tolist() == [BOS, 4, 5, EOS]
  assert vocabulary.truncated_count([("is blue",)]) == 0


def test_encode_all_stacks_rows_and_warns_once(caplog):
  vocabulary = small(max_words=4)
  queries = [("is blue",), ("is blue and long",), ("has a vneck", "is long")]
  with caplog.at_level("WARNING", logger="absl"):
    ids, mask = vocabulary.encode_all(queries)
  assert ids.shape == mask.shape == (3, 4)
  for i, query in enumerate(queries):
    np.testing.assert_array_equal(ids[i], vocabulary.encode(query)[0])
    np.testing.assert_array_equal(mask[i], vocabulary.encode(query)[1])
  assert [r.getMessage().startswith("2 of 3 texts") for r in caplog.records] == [True]


def test_saved_vocabulary_comes_back_equal(tmp_path):
  vocabulary = small()
  vocabulary.save(tmp_path / "vocab.json")
  assert Vocabulary.load(tmp_path / "vocab.json") == vocabulary
  assert [path.name for path in tmp_path.iterdir()] == ["vocab.json"]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "vocab.json"
  small().save(path)
  before = path.read_bytes()

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr("os.replace", fail)
  with pytest.raises(OSError, match="disk full"):
    small(max_words=9).save(path)
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["vocab.json"]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ("[]", "expected an object with keys .*found list"),
    ('{"words": []}', r"expected an object with keys .*found \['words'\]"),
    ('{"markers": "tokens", "max_words": 8, "words": [1]}', "list of strings"),
    ('{"markers": "tokens", "max_words": 8, "words": ["is"]}', "expected to begin with"),
    ('{"markers": "tags", "max_words": 8, "words": []}', "markers: expected one of"),
    ('{"markers": "tokens", "max_words": 2, "words": []}', "max_words: expected"),
    ('{"markers": "tokens", "max_words": "8", "words": []}', "max_words: expected"),
    (
      '{"markers": "tokens", "max_words": 8,'
      ' "words": ["<UNK>", "<AND>", "<BOS>", "<EOS>", "is", "is"]}',
      "1 words are listed twice",
    ),
  ],
)
def test_broken_file_is_named_with_what_is_wrong(tmp_path, content, message):
  path = tmp_path / "vocab.json"
  path.write_text(content)
  with pytest.raises(UserError, match=message) as error:
    Vocabulary.load(path)
  assert str(path) in str(error.value)


def test_absent_file_is_named(tmp_path):
  with pytest.raises(UserError, match=r"vocab\.json: no such file"):
    Vocabulary.load(tmp_path / "vocab.json")


def test_swapped_words_are_refused_and_files_without_a_checksum_are_not(tmp_path):
  path = tmp_path / "vocab.json"
  vocabulary = small()
  vocabulary.save(path)
  content = json.loads(path.read_text())
  words = content["words"]
  swapped = [*words[:-2], words[-1], words[-2]]
  for change in ({"words": swapped}, {"max_words": 9}, {"checksum": "0"}):
    path.write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=r"vocab\.json: its content is not what its checksum says"):
      Vocabulary.load(path)
  path.write_text(json.dumps(content, indent=3))
  assert Vocabulary.load(path) == vocabulary
  del content["checksum"]
  path.write_text(json.dumps(content))
  assert Vocabulary.load(path) == vocabulary


@pytest.mark.parametrize("texts", ["is blue", ()])
def test_captions_of_a_query_are_a_non_empty_sequence(texts):
  with pytest.raises(ValueError, match="expected the captions of one query"):
    small().encode(texts)
