"""Milvus behind its interface: what is kept, who may open it, what filters may hold."""

import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pymilvus
import pytest
from milvus_lite.server_manager import server_manager_instance

from crn_jax.catalogue import store as stores
from crn_jax.catalogue.filters import equals
from crn_jax.catalogue.store import Store
from crn_jax.errors import UserError
from tests.catalogue import made

# All that a text in a filter could be taken for.
ODD = [
  'a"b',
  "a'b",
  "a\\",
  '\\" or 1 == 1 or kind == "',
  "a\nb\rc\td",
  "ü€😀",
  "%",
  "{x}",
  "",
  "\x01",
]


@pytest.fixture(params=["embedded", "server"])
def store(request, tmp_path):
  """An empty catalogue; by the address that Milvus Lite itself listens at, as if on a server."""
  with Store(tmp_path / "a.db", create=True) as embedded:
    if request.param == "embedded":
      embedded.create(made.about())
      yield embedded
    else:
      with Store(address(tmp_path / "a.db")) as served:
        served.create(made.about())
        assert not served.embedded
        yield served


def address(folder: pathlib.Path) -> str:
  return server_manager_instance.start_and_get_uri(str(folder))


class TestRows:
  def test_come_back_as_they_were_written(self, store):
    rows = [made.row(f"{i}{odd}", name=odd, price=1.5, new=True) for i, odd in enumerate(ODD)]
    vectors = made.unit_vectors(len(ODD), 0)
    store.write(rows, vectors, [])
    store.flush()
    assert store.count() == len(ODD)
    assert made.content(store) == {
      row.id: (row, vector.tobytes()) for row, vector in zip(rows, vectors, strict=True)
    }
    assert store.get([rows[0].key, rows[0].key, "absent"]) == {rows[0].key: rows[0]}
    (vector,) = store.get_vectors([rows[1].key]).values()
    np.testing.assert_array_equal(vector, vectors[1])

  def test_pages_leave_none_out(self, store, monkeypatch):
    monkeypatch.setattr(stores, "_PAGE", 7)
    monkeypatch.setattr(stores, "_NAMED", 5)
    rows = [made.row(f'"{i}\\') for i in range(30)]
    store.write(rows, made.unit_vectors(30, 0), [])
    assert len(made.content(store)) == 30
    assert len(store.get([row.key for row in rows])) == 30
    store.delete([row.key for row in rows[:12]])
    assert store.count() == 18

  def test_replacing_a_row_replaces_its_metadata(self, store):
    """Milvus Lite would keep those that the new row does not have."""
    store.write([made.row("a", kind="dress", price=3)], made.unit_vectors(1, 0), [])
    new = made.row("a", kind="shirt")
    store.write([new], made.unit_vectors(1, 1), [new.key])
    assert list(store.rows()) == [new]
    assert store.matching("price == 3") == []

  @pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 2.0])
  def test_vectors_without_a_direction_are_refused(self, store, value):
    """Milvus stores NaN without a word."""
    vectors = made.unit_vectors(2, 0)
    vectors[1] = value
    with pytest.raises(ValueError, match="unit length"):
      store.write([made.row("a"), made.row("b")], vectors, [])
    assert store.count() == 0

  def test_a_sample_is_the_same_every_time(self, store):
    rows = [made.row(str(i), odd=i % 2) for i in range(20)]
    store.write(rows, made.unit_vectors(20, 0), [])
    drawn = store.sample(5)
    assert len({row.id for row in drawn}) == 5
    assert store.sample(5) == drawn
    assert {row.metadata["odd"] for row in store.sample(20, "odd == 1")} == {1}
    assert store.sample(0) == []


class TestFilters:
  def test_any_value_is_found_and_nothing_else(self, store):
    rows = [made.row(str(i), name=odd) for i, odd in enumerate(ODD)]
    store.write(rows, made.unit_vectors(len(ODD), 0), [])
    for row in rows:
      assert store.matching(equals("name", row.metadata["name"])) == [row.key]
      ((hit, _),) = store.search(made.unit_vectors(1, 1), 5, equals("name", row.metadata["name"]))[
        0
      ]
      assert hit == row.key

  def test_numbers_truths_and_absent_values(self, store):
    rows = [made.row("a", n=3, f=1.5, t=True), made.row("b", n=4, t=False), made.row("c")]
    store.write(rows, made.unit_vectors(3, 0), [])
    for filter_, expected in (
      (equals("n", 3), "a"), (equals("f", 1.5), "a"), (equals("t", True), "a"), ("n > 2", "ab"),
      (equals("t", False), "b"), ('other == "x"', ""), ("n >= 3 and n < 4", "a"),
    ):  # fmt: skip
      found = {row.id for row in store.get(store.matching(filter_)).values()}
      assert found == set(expected), filter_

  @pytest.mark.parametrize(
    "filter_", ["kind = dress ==", 'kind == "dress', "and", "vector == 3", "kind", "1", "(", '"x"']
  )
  def test_what_is_no_filter_is_said_in_a_sentence(self, store, filter_):
    store.write([made.row("a")], made.unit_vectors(1, 0), [])
    for ask in (
      store.matching, lambda f: store.search(made.unit_vectors(1, 0), 3, f),
      lambda f: store.sample(3, f),
    ):  # fmt: skip
      with pytest.raises(UserError) as error:
        ask(filter_)
      assert str(error.value).startswith(f"filter {filter_!r}: not understood (")
      assert "\n" not in str(error.value)


class TestAbout:
  def test_it_outlives_the_process(self, tmp_path):
    about = made.about(facets={"kind": {"values": ["ü", '"']}})
    with Store(tmp_path / "a.db", create=True) as store:
      assert store.about() is None
      store.create(about)
    with Store(tmp_path / "a.db") as store:
      assert store.about() == about
      store.describe(made.about(generation="h"))
      assert store.about() == made.about(generation="h")

  def test_facets_that_do_not_fit_are_left_out(self, tmp_path):
    with Store(tmp_path / "a.db", create=True) as store:
      store.create(made.about(facets={"kind": {"values": ["x" * 70_000]}}))
      assert store.about() == made.about()

  def test_a_newer_format_is_refused(self, tmp_path, monkeypatch):
    with Store(tmp_path / "a.db", create=True) as store:
      store.create(made.about())
      monkeypatch.setattr(stores, "_FORMAT", stores._FORMAT - 1)
      with pytest.raises(UserError, match="newer version"):
        store.about()

  def test_a_begun_catalogue_is_begun_anew(self, tmp_path):
    """Stopped between the two collections, or before the row of the second."""
    with Store(tmp_path / "a.db", create=True) as store:
      store.create(made.about())
      store._client.drop_collection(store._about)
    with Store(tmp_path / "a.db") as store:
      assert store.about() is None
      store.create(made.about())
      store._client.delete(store._about, filter='key == "about"')
    with Store(tmp_path / "a.db") as store:
      assert store.about() is None
      store.create(made.about(dim=4))
      store.write([made.row("a")], made.unit_vectors(1, 0, dim=4), [])
    with Store(tmp_path / "a.db") as store:
      assert store.about() == made.about(dim=4)
      assert store.count() == 1

  def test_a_collection_of_another_program_is_left_alone(self, tmp_path):
    with Store(tmp_path / "a.db", "mine", create=True) as store:
      store._client.create_collection("mine", dimension=4)
      store._client.insert("mine", [{"id": 1, "vector": [1, 0, 0, 0]}])
      with pytest.raises(UserError, match="mine is of another program; choose another --coll"):
        store.create(made.about())
      assert store._client.query("mine", filter="", output_fields=["count(*)"])[0]["count(*)"] == 1

  def test_several_catalogues_in_one_store(self, tmp_path):
    for name in ("a", "b"):
      with Store(tmp_path / "a.db", name, create=True) as store:
        store.create(made.about())
        store.write([made.row(name)], made.unit_vectors(1, 0), [])
    with Store(tmp_path / "a.db", "a") as store:
      assert [row.id for row in store.rows()] == ["a"]


class TestFailures:
  @pytest.mark.parametrize(
    "ask",
    [
      lambda s: s.about(), lambda s: s.count(), lambda s: list(s.rows()), lambda s: s.flush(),
      lambda s: s.write([made.row("a")], made.unit_vectors(1, 0), []), lambda s: s.sample(2),
      lambda s: list(s.vectors(made.DIM)), lambda s: s.get(["a"]), lambda s: s.get_vectors(["a"]),
      lambda s: s.delete(["a"]), lambda s: s.describe(made.about()), lambda s: s.matching("n > 1"),
      lambda s: s.search(made.unit_vectors(1, 0), 3, ""), lambda s: s.create(made.about()),
    ],
  )  # fmt: skip
  def test_what_milvus_raises_becomes_a_sentence(self, ask, tmp_path, monkeypatch):
    with Store(tmp_path / "a.db", create=True) as store:
      store.create(made.about())

      def fail(*args, **kwargs):
        raise pymilvus.MilvusException(1, "connection lost\nmore")

      for name in ("query", "upsert", "delete", "flush", "search", "query_iterator",
                   "has_collection"):  # fmt: skip
        monkeypatch.setattr(store._client, name, fail)
      with pytest.raises(UserError, match=r"connection lost\)") as error:
        ask(store)
      assert "\n" not in str(error.value)


HOLD = """
import sys, time
from crn_jax.catalogue.store import Store
with Store(sys.argv[1], create=True):
  print("held", flush=True)
  sys.stdin.read()
"""


class TestOpening:
  def test_a_second_process_is_told_who_holds_it(self, tmp_path):
    process = subprocess.Popen(
      [sys.executable, "-c", HOLD, str(tmp_path / "a.db")],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
      assert process.stdout.readline() == "held\n"
      with pytest.raises(UserError) as error:
        Store(tmp_path / "a.db")
      assert f"another process has this index open (process {process.pid} on" in str(error.value)
      assert "--index=http://host:19530" in str(error.value)
    finally:
      process.send_signal(signal.SIGKILL)
      process.wait()
    Store(tmp_path / "a.db").close()

  def test_another_program_that_holds_milvus_itself(self, tmp_path):
    with Store(tmp_path / "a.db", create=True):
      pass
    server_manager_instance.release_server(str(tmp_path / "a.db"))
    code = HOLD.replace(
      "with Store(sys.argv[1], create=True):",
      "import pymilvus\nclient = pymilvus.MilvusClient(sys.argv[1])\nif True:",
    )
    process = subprocess.Popen(
      [sys.executable, "-c", code, str(tmp_path / "a.db")],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
      assert process.stdout.readline() == "held\n"
      with pytest.raises(UserError, match="Does another program have it open"):
        Store(tmp_path / "a.db")
    finally:
      process.kill()
      process.wait()

  def test_closing_lets_the_next_one_in(self, tmp_path):
    for _ in range(3):
      with Store(tmp_path / "a.db", create=True) as store, pytest.raises(UserError):
        Store(tmp_path / "a.db")
      assert store.cache.is_dir()

  @pytest.mark.parametrize(
    ("name", "message"),
    [
      ("catalogue", "expected a name that ends in .db, or http"),
      ("old.db", "a file, and so no index .* Milvus Lite 2"),
      ("photos.db", "photos.db: a folder, but no index"),
      ("absent.db", "no such index; make it with python main.py --mode=index"),
      ("nowhere/absent.db", "no such index"),
      ("http://user:secret@localhost:1", "MILVUS_TOKEN=USER:PASSWORD"),
    ],
  )
  def test_what_is_no_index(self, name, message, tmp_path):
    (tmp_path / "old.db").write_bytes(b"SQLite format 3\0")
    made.picture(tmp_path / "photos.db" / "a.png", 0)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as error:
      Store(name if name.startswith("http") else tmp_path / name)
    assert "secret" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before

  def test_folders_above_are_made(self, tmp_path):
    with Store(tmp_path / "x" / "y.db", create=True) as store:
      store.create(made.about())
    assert (tmp_path / "x" / "y.db").is_dir()

  def test_a_name_of_a_collection(self, tmp_path):
    with pytest.raises(UserError, match="collection 'a-b': expected letters"):
      Store(tmp_path / "a.db", "a-b", create=True)

  def test_a_server_that_is_not_there(self, monkeypatch):
    real = stores.MilvusClient
    monkeypatch.setattr(stores, "MilvusClient", lambda *a, **k: real(*a, timeout=0.2, **k))
    with pytest.raises(UserError, match="no connection to a Milvus server .* MILVUS_TOKEN"):
      Store("http://127.0.0.1:9")

  def test_the_token_comes_from_the_environment(self, monkeypatch):
    seen = {}

    class Client:
      def __init__(self, uri, token, grpc_options):
        seen.update(uri=uri, token=token)

      def close(self):
        pass

      def has_collection(self, name):
        return False

    monkeypatch.setattr(stores, "MilvusClient", Client)
    monkeypatch.setenv("MILVUS_TOKEN", "root:Milvus")
    Store("https://host:19530").close()
    assert seen == {"uri": "https://host:19530", "token": "root:Milvus"}


def test_the_port_of_an_embedded_store_is_of_this_machine_alone(tmp_path):
  """It asks for no password; a port of all addresses would answer at 127.0.0.2, too."""
  with Store(tmp_path / "a.db", create=True):
    host, _, port = address(tmp_path / "a.db").removeprefix("http://").partition(":")
    assert host == "127.0.0.1"
    socket.create_connection((host, int(port))).close()
    with pytest.raises(ConnectionRefusedError):
      socket.create_connection(("127.0.0.2", int(port)))
