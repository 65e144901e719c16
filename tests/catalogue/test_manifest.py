"""Manifests: ids, paths and metadata of pictures."""

import pytest

from crn_jax.catalogue import manifest
from crn_jax.errors import UserError


def read(tmp_path, name: str, content: str | bytes):
  path = tmp_path / name
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  return manifest.read(path)


def test_csv(tmp_path):
  found = read(
    tmp_path,
    "list.csv",
    '\ufeffid,path,kind,price,size,sku\nA 1,a.png,"dress, ""long""",10,1.5,007\n'
    "B,/abs/b.png,,-20,2,8\n",
  )
  assert [(s.id, s.path) for s in found] == [("A 1", f"{tmp_path}/a.png"), ("B", "/abs/b.png")]
  assert [s.metadata for s in found] == [
    {"kind": 'dress, "long"', "price": 10, "size": 1.5, "sku": "007"},
    {"price": -20, "size": 2.0, "sku": "8"},  # A text, as 007 is one.
  ]


def test_csv_cells_may_hold_lines_and_any_separator(tmp_path):
  (found,) = read(tmp_path, "list.csv", 'path,note\r\na.png,"one\ntwo\u2028three"\r\n')
  assert found.metadata == {"note": "one\ntwo\u2028three"}


def test_jsonl(tmp_path):
  found = read(
    tmp_path,
    "list.jsonl",
    '{"path": "x/a.png", "kind": "dress", "new": true, "price": 1.5, "gone": null}\n\n'
    '{"path": "b.png", "id": 7, "kind": "1"}\n',
  )
  assert [s.id for s in found] == ["x/a.png", "7"]
  assert [s.metadata for s in found] == [
    {"kind": "dress", "new": True, "price": 1.5}, {"kind": "1"},
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ('{"path": "a.png"', "line 2: no JSON"),
    ('["a.png"]', "line 2: expected an object"),
    ("[" * 100_000, "line 2: no JSON"),
    ('{"file": "a.png"}', "line 2: expected the path of a picture as path, found None"),
    ('{"path": ""}', "line 2: expected the path"),
    ('{"path": "a.png", "id": [1]}', "line 2: expected a text or a whole number as id"),
    ('{"path": "a.png", "id": true}', "line 2: expected a text or a whole number as id"),
    ('{"path": "a.png", "id": ""}', "line 2: the id has 0 bytes"),
    ('{"path": "a.png", "id": "first"}', "line 2: the id 'first' stands in line 1, too"),
    ('{"path": "a.png", "tags": ["x"]}', "line 2: tags: expected a text, a number"),
    ('{"path": "a.png", "n": NaN}', "line 2: n: expected a finite number"),
    ('{"path": "a.png", "n": 9223372036854775808}', "line 2: n: .* does not fit 64 bits"),
    ('{"path": "a.png", "s": "\\ud800"}', "line 2: s: no valid text"),
    ('{"path": "\\ud800.png", "id": "x"}', "line 2: the path is no UTF-8"),
    ('{"path": "a.png", "price in EUR": 1}', "line 2: 'price in EUR' is no name for a filter"),
    ('{"path": "a.png", "größe": 1}', "line 2: 'größe' is no name for a filter"),
    ('{"path": "a.png", "vector": 1}', "line 2: 'vector' has a meaning of its own"),
    ('{"path": "a.png", "LIKE": 1}', "line 2: 'LIKE' has a meaning of its own"),
    ('{"path": "a.png", "s": "' + "x" * 70_000 + '"}', "line 2: its metadata have more than"),
    ('{"path": "' + "x" * 5_000 + '", "id": "x"}', "line 2: the path has 5,"),
  ],
)
def test_a_line_that_cannot_be_used(line, message, tmp_path):
  with pytest.raises(UserError, match=message):
    read(tmp_path, "list.jsonl", '{"path": "first.png", "id": "first"}\n' + line + "\n")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("", "expected a first line with different names of columns, path among them, found nothing"),
    ("id,kind\n1,dress\n", "path among them, found id, kind"),
    ("path,kind,kind\na,b,c\n", "different names"),
    ("path,kind\na.png\n", "line 2: expected 2 cells, found 1"),
    ("path,kind\na.png,b,c\n", "line 2: expected 2 cells, found 3"),
    ("path,kind\na.png,b\na.png,c\n", "line 3: the id 'a.png' stands in line 2, too"),
    ('path,kind\na.png,"b\n', "line 2: no CSV"),
    (b"path,kind\na.png,\xe9\n", r"list.csv: no UTF-8 \(byte 16\)"),
  ],
)
def test_a_table_that_cannot_be_used(content, message, tmp_path):
  with pytest.raises(UserError, match=message):
    read(tmp_path, "list.csv", content)


def test_many_faults_are_counted_and_the_first_ones_shown(tmp_path):
  with pytest.raises(UserError) as error:
    read(tmp_path, "list.jsonl", "{}\n" * 25)
  first, *lines = str(error.value).splitlines()
  assert first.endswith("list.jsonl: 25 of its lines cannot be used:")
  assert len(lines) == 11
  assert lines[-1].strip() == "and 15 more"
