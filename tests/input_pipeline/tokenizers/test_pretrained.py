"""Ids of the towers' tokenizers: transformers' own, from a folder, without a network."""

import json
import shutil
import socket

import numpy as np
import pytest

from crn_jax.errors import UserError
from crn_jax.input_pipeline.tokenizers import base
from crn_jax.input_pipeline.tokenizers.pretrained import PretrainedTokenizer
from crn_jax.reports import cases
from tests import small_towers
from tests.small_towers import FAMILIES, LENGTH
from tests.torch_models import transformers

CAPTIONS = small_towers.captions(200)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """family -> folder with its tokenizer."""
  made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
  for family, folder in made.items():
    small_towers.save_tokenizer(family, folder)
    small_towers.model(family).config.save_pretrained(folder)
  return made


def tokenizer(family, folder):
  return PretrainedTokenizer(folder, LENGTH[family], lower_case=family != "clip")


def theirs(family, folder, texts):
  """Ids and mask by transformers alone, padded on the right to the towers' length."""
  found = transformers.AutoTokenizer.from_pretrained(folder)
  rows = found(texts, padding="max_length", padding_side="right", max_length=LENGTH[family],
               truncation=True, return_attention_mask=True)  # fmt: skip
  return np.array(rows["input_ids"]), np.array(rows["attention_mask"]).astype(bool)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_real_captions_are_those_of_transformers(family, folders, monkeypatch):
  assert len(CAPTIONS) == 200
  ids, mask = theirs(family, folders[family], CAPTIONS)
  monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
  ours = tokenizer(family, folders[family])
  found = ours.encode_all([(caption,) for caption in CAPTIONS])
  assert (found[0].dtype, found[1].dtype) == (np.int32, bool)
  np.testing.assert_array_equal(found[0], ids)
  np.testing.assert_array_equal(found[1], mask)
  assert found[1][:, 0].all() and len(np.unique(found[0])) > 50
  one = ours.encode((CAPTIONS[7],))
  np.testing.assert_array_equal(one[0], ids[7])
  np.testing.assert_array_equal(one[1], mask[7])


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_of_a_query_are_joined(family, folders):
  ours = tokenizer(family, folders[family])
  joined = ours.encode(("is darker", "has no sleeves"))
  np.testing.assert_array_equal(joined[0], ours.encode(("is darker and has no sleeves",))[0])
  for wrong in ("is darker", ()):
    with pytest.raises(ValueError, match="expected the captions of one query"):
      ours.encode(wrong)
  ids, mask = ours.encode_all([])
  assert ids.shape == mask.shape == (0, LENGTH[family]) and ours.truncated_count([]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_longer_texts_are_cut_before_their_end_and_counted(family, folders, caplog):
  ours = tokenizer(family, folders[family])
  queries = [("is red",), ("is longer and longer " * 40,)]
  ids, mask = ours.encode_all(queries)
  assert ids.shape == (2, LENGTH[family]) and mask[1].all()
  end = ids[0][mask[0]][-1]
  assert ids[1, -1] == end and end not in ids[1, :-1]
  assert ours.truncated_count(queries) == 1
  assert f"1 of 2 texts are longer than the {LENGTH[family]} tokens" in caplog.text


def test_the_files_of_clip_name_no_length(folders):
  """So that without ours a text would be as long as it is."""
  found = transformers.AutoTokenizer.from_pretrained(folders["clip"])
  assert found.model_max_length > 1e9
  assert len(found("red " * 200, truncation=True)["input_ids"]) > 77


def test_siglip_2_pads_on_the_left_unless_it_is_told(folders):
  found = transformers.AutoTokenizer.from_pretrained(folders["siglip2"])
  left = found("is red", padding="max_length", max_length=13)["input_ids"]
  ids, mask = tokenizer("siglip2", folders["siglip2"]).encode(("is red",))
  assert list(ids) != left and sorted(ids) == sorted(left)
  assert mask[0] and not mask[-1]


def test_texts_of_siglip_2_are_lower_cased_by_a_tokenizer_that_would_not(folders, tmp_path):
  """Published ones are of Gemma's class, which keeps capitals."""
  trained = json.loads((folders["siglip2"] / "tokenizer.json").read_text())
  merges = [tuple(pair) for pair in trained["model"]["merges"]]
  gemma = transformers.GemmaTokenizer(vocab=trained["model"]["vocab"], merges=merges)
  gemma.save_pretrained(tmp_path)
  lower, plain = (PretrainedTokenizer(tmp_path, 13, lower_case=flag) for flag in (True, False))
  assert type(lower._tokenizer) is transformers.GemmaTokenizer
  np.testing.assert_array_equal(lower.encode(("Is RED",))[0], plain.encode(("is red",))[0])
  assert list(plain.encode(("Is RED",))[0]) != list(plain.encode(("is red",))[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_shown_as_the_towers_read_them(family, folders):
  ours = tokenizer(family, folders[family])
  words = ours.read(("has <3 v-neck",))
  ids, mask = ours.encode(("has <3 v-neck",))
  assert [i for _, i in words] == ids[mask].tolist()
  assert all(words) and all(word for word, _ in words)
  roles = [ours.role(i) for _, i in words]
  assert roles[-1] == "marker" and (roles[0] == "marker") == (family == "clip")
  assert words[-1][0] == {"clip": "endoftext", "siglip": "s", "siglip2": "eos"}[family]
  shown = "".join(word for (word, _), role in zip(words, roles, strict=True) if role != "marker")
  assert "has" in shown and "neck" in shown
  assert all(word.text for word in cases.shown_words(("has <3 v-neck",), ours))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_keeps_its_tokenizer(family, folders, tmp_path):
  ours = tokenizer(family, folders[family])
  for _ in range(2):  # A run that is continued saves it again.
    ours.save(tmp_path / "vocab.json")
    ours = base.load(tmp_path / "vocab.json")
  assert ours.folder == tmp_path / "tokenizer"
  expected = theirs(family, folders[family], CAPTIONS[:20])
  found = ours.encode_all([(caption,) for caption in CAPTIONS[:20]])
  np.testing.assert_array_equal(found[0], expected[0])
  assert len(ours) == len(transformers.AutoTokenizer.from_pretrained(folders[family]))


def test_a_tokenizer_that_changed_since_is_refused(folders, tmp_path):
  tokenizer("clip", folders["clip"]).save(tmp_path / "vocab.json")
  file = tmp_path / "tokenizer" / "merges.txt"
  file.write_text(file.read_text() + "a b\n")
  with pytest.raises(UserError, match="merges.txt: changed since the run was begun"):
    base.load(tmp_path / "vocab.json")
  file.unlink()
  with pytest.raises(UserError, match="merges.txt: removed since the run was begun"):
    base.load(tmp_path / "vocab.json")


@pytest.mark.parametrize(
  ("family", "missing"),
  [("clip", "merges.txt"), ("clip", "vocab.json"), ("siglip", "spiece.model"),
   ("siglip2", "tokenizer.json")],
)  # fmt: skip
def test_missing_files_are_named(family, missing, folders, tmp_path):
  shutil.copytree(folders[family], tmp_path, dirs_exist_ok=True)
  (tmp_path / missing).unlink()
  with pytest.raises(UserError, match="no tokenizer in this folder; it needs one of: tokenizer"):
    tokenizer(family, tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2"])
def test_damaged_files_are_refused_with_the_folder(content, folders, tmp_path):
  shutil.copytree(folders["siglip2"], tmp_path, dirs_exist_ok=True)
  (tmp_path / "tokenizer.json").write_text(content)
  with pytest.raises(UserError, match=f"{tmp_path}: no tokenizer that transformers can read"):
    tokenizer("siglip2", tmp_path)


def test_no_code_of_the_folder_is_run(folders, tmp_path):
  shutil.copytree(folders["siglip2"], tmp_path, dirs_exist_ok=True)
  path = tmp_path / "tokenizer_config.json"
  settings = json.loads(path.read_text())
  settings["auto_map"] = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
  path.write_text(json.dumps(settings))
  (tmp_path / "evil.py").write_text("raise SystemExit('code of the folder was run')\n")
  tokenizer("siglip2", tmp_path).encode(("is red",))
