"""Where a catalogue is kept: a collection of Milvus, embedded in a folder or on a server.

What Milvus needs to be told, and what it must not be, is known here only.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pymilvus
from pymilvus import DataType, MilvusClient

from crn_jax.catalogue import filters, lite
from crn_jax.catalogue.pictures import Metadata
from crn_jax.errors import UserError

TOKEN = "MILVUS_TOKEN"
COLLECTION = "catalogue"

# They print every error with its traceback before they raise it, and whatever Milvus Lite lacks.
for _name in ("pymilvus", "milvus_lite", "grpc._server"):
  logging.getLogger(_name).setLevel(logging.CRITICAL)

_FIELDS = ("id", "path", "digest", "bytes", "width", "height")
# Rows that are listed at a time (a server gives at most 16,384), and floats of listed vectors:
# each is a Python object of 32 bytes for a moment.
_PAGE, _PAGE_FLOATS = 10_000, 2_000_000
# Rows that are named in one filter.
_NAMED = 1_000
# Larger rankings are refused by Milvus.
MAX_K = 1_000
# The row of `about`, and the width of the vector that every collection must have.
_ABOUT_KEY, _ABOUT_DIM = "about", 2
_ABOUT_BYTES = 60_000
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Row:
  """A picture in the store, without its vector.

  Attributes:
    id: by which people name it.
    path: absolute path of its file when it was indexed.
    digest: SHA-256 of the file, hexadecimal.
    bytes, width, height: size of the file, and of the picture in pixels.
    metadata: name -> value.
  """

  id: str
  path: str
  digest: str
  bytes: int
  width: int
  height: int
  metadata: Metadata

  @property
  def key(self) -> str:
    return key_of(self.id)


@dataclasses.dataclass(frozen=True)
class About:
  """What a catalogue says of itself.

  Attributes:
    model: path of the folder of the model.
    digest: of the model; vectors of another one are not comparable.
    dim: width of the vectors.
    generation: another one after every change.
    facets: name of metadata -> {"values": [...]} or {"least", "greatest"}; see `indexing.facets`.
  """

  model: str
  digest: str
  dim: int
  generation: str
  facets: dict = dataclasses.field(default_factory=dict)


def key_of(identifier: str) -> str:
  """The primary key of a picture: safe in the filters that Milvus's clients put together."""
  return hashlib.sha256(identifier.encode()).hexdigest()[:32]


def is_server(index: str) -> bool:
  return index.startswith(("http://", "https://"))


def _in_words(method):
  """Makes a sentence of what Milvus raises: a lost connection, a full disk."""

  @functools.wraps(method)
  def call(self, *args, **kwargs):
    try:
      return method(self, *args, **kwargs)
    except pymilvus.MilvusException as error:
      raise UserError(f"{self.index}: Milvus failed ({filters.first_line(error)})") from error

  return call


class Store:
  """A catalogue in Milvus; closed at the end of a `with` block.

  Attributes:
    index: the folder of Milvus Lite, or the address of a server.
    cache: folder for what is derived from the rows; None on a server.
  """

  def __init__(
    self, index: str | os.PathLike, collection: str = COLLECTION, *, create: bool = False
  ):
    """Connects.

    Args:
      index: a folder NAME.db, or http(s)://host:port; its token is read from $MILVUS_TOKEN.
      collection: name of the collection.
      create: whether a folder may be made.

    Raises:
      UserError: there is no such index, another process holds it, or the server cannot be reached.
    """
    self.index, self._name = os.fspath(index), collection
    if not re.fullmatch(r"[A-Za-z_]\w{0,200}", collection, re.ASCII):
      raise UserError(f"collection {collection!r}: expected letters, digits and _, no digit first")
    self._held = contextlib.ExitStack()
    self.cache: pathlib.Path | None = None
    token = ""
    with contextlib.ExitStack() as undo:
      undo.callback(self._held.close)
      if is_server(self.index):
        if "@" in self.index:
          raise UserError(
            f"index: give user and password as {TOKEN}=USER:PASSWORD, not in its address"
          )
        token = os.environ.get(TOKEN, "")
        uri = self.index
      else:
        uri, self.cache = self._held.enter_context(lite.held(self.index, create=create))
      try:
        # Pings of an idle connection are too many for Milvus Lite, which then complains of them.
        quiet = {"grpc.keepalive_permit_without_calls": 0}
        self._client = MilvusClient(uri, token=token, grpc_options=quiet)
        self._held.callback(self._client.close)
        self._exists = self._client.has_collection(self._about)
        if self._exists:
          for name in (self._about, self._name):
            self._client.load_collection(name)
      except pymilvus.MilvusException as error:
        raise UserError(self._cannot_open(error)) from error
      undo.pop_all()

  def __enter__(self) -> "Store":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    self._held.close()

  @property
  def embedded(self) -> bool:
    return self.cache is not None

  @_in_words
  def about(self) -> About | None:
    """What the catalogue says of itself; None if there is none yet.

    Raises:
      UserError: it was written by a newer version.
    """
    if not self._exists:
      return None
    rows = self._query(self._about, f"key == {filters.quote(_ABOUT_KEY)}", ["content"])
    if not rows:
      return None
    content = json.loads(rows[0]["content"])
    if content.pop("format") > _FORMAT:
      raise UserError(f"{self.index}: written by a newer version of this program; update it")
    return About(**content)

  @_in_words
  def create(self, about: About) -> None:
    """Makes an empty catalogue."""
    if self._client.has_collection(self._name):
      self._refuse_foreign(self._name)
    for name in (self._name, self._about):  # What a stopped attempt has left.
      self._client.drop_collection(name)
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=about.dim)
    for field, most in (("id", 1_000), ("path", 4_000), ("digest", 64)):
      schema.add_field(field, DataType.VARCHAR, max_length=most)
    for field in ("bytes", "width", "height"):
      schema.add_field(field, DataType.INT64)
    self._create(self._name, schema)
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=64)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=_ABOUT_DIM)
    schema.add_field("content", DataType.VARCHAR, max_length=65_535)
    self._create(self._about, schema)
    self._exists = True
    self.describe(about)

  @_in_words
  def describe(self, about: About) -> None:
    """Writes what the catalogue says of itself."""
    content = {"format": _FORMAT, **dataclasses.asdict(about)}
    text = json.dumps(content)
    if len(text) > _ABOUT_BYTES:
      text = json.dumps(content | {"facets": {}})
    row = {"key": _ABOUT_KEY, "vector": [1.0] * _ABOUT_DIM, "content": text}
    self._client.upsert(self._about, [row])

  @_in_words
  def write(self, rows: Sequence[Row], vectors: np.ndarray, replaced: Sequence[str]) -> None:
    """Adds pictures; once it returns, they outlive the process, however it ends.

    Args:
      rows: of n pictures.
      vectors: [n, dim] float32, of unit length.
      replaced: keys of the pictures that are there already.

    Raises:
      ValueError: a vector is not of unit length; NaN would be stored without a word.
    """
    if not unit(vectors).all():
      raise ValueError("expected vectors of unit length")
    # Milvus Lite would keep the metadata of a row that is overwritten.
    self.delete(replaced)
    self._client.upsert(
      self._name,
      [
        {"key": row.key, "vector": vector, **{f: getattr(row, f) for f in _FIELDS}, **row.metadata}
        for row, vector in zip(rows, vectors, strict=True)
      ],
    )

  @_in_words
  def delete(self, keys: Iterable[str]) -> None:
    keys = list(keys)
    for start in range(0, len(keys), _NAMED):
      self._client.delete(self._name, filter=filters.named(keys[start : start + _NAMED]))

  @_in_words
  def flush(self) -> None:
    """Brings what was written into its place; without it, asking takes seconds."""
    for name in (self._name, self._about):
      self._client.flush(name)

  @_in_words
  def count(self) -> int:
    return self._query(self._name, "", ["count(*)"])[0]["count(*)"]

  def rows(self) -> Iterator[Row]:
    """All pictures."""
    for page in self._pages([*_FIELDS, "$meta"], _PAGE):
      yield from map(_row, page)

  def vectors(self, dim: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """All vectors, piece by piece: keys, [n, dim] float32."""
    for page in self._pages(["vector"], max(1, min(_PAGE, _PAGE_FLOATS // dim))):
      yield [row["key"] for row in page], np.asarray([row["vector"] for row in page], np.float32)

  @_in_words
  def get(self, keys: Iterable[str]) -> dict[str, Row]:
    """Pictures by their keys; absent ones are left out."""
    found = self._get(keys, [*_FIELDS, "$meta"])
    return {row["key"]: _row(row) for row in found}

  @_in_words
  def get_vectors(self, keys: Iterable[str]) -> dict[str, np.ndarray]:
    """Vectors [dim] float32 by their keys; absent ones are left out."""
    return {
      row["key"]: np.asarray(row["vector"], np.float32) for row in self._get(keys, ["vector"])
    }

  @_in_words
  def matching(self, filter_: str) -> list[str]:
    """Keys of all pictures that a filter lets through; for embedded catalogues.

    Raises:
      UserError: the filter is none.
    """
    with filters.said_of(filter_):
      return [row["key"] for row in self._query(self._name, filter_, ["key"])]

  @_in_words
  def sample(self, n: int, filter_: str = "") -> list[Row]:
    """Some pictures, the same ones every time: the first by their keys, which are hashes."""
    with filters.said_of(filter_):
      iterator = self._client.query_iterator(
        self._name, batch_size=n, limit=n, filter=filter_, output_fields=[*_FIELDS, "$meta"]
      )
      found = iterator.next() if n else []
      iterator.close()
    return [_row(row) for row in found]

  @_in_words
  def search(self, vectors: np.ndarray, k: int, filter_: str) -> list[list[tuple[str, float]]]:
    """The k best pictures that a filter lets through: of each query (key, cosine), best first.

    Args:
      vectors: [n, dim] float32, of unit length.
      k: how many, at most `MAX_K`.
      filter_: an expression of Milvus; "" for all.

    Raises:
      UserError: the filter is none.
    """
    with filters.said_of(filter_):
      # Without output fields whole vectors come back.
      found = self._client.search(
        self._name, data=vectors.tolist(), limit=k, filter=filter_, output_fields=["key"],
        search_params={"metric_type": "COSINE"},
      )  # fmt: skip
    return [[(hit["entity"]["key"], float(hit["distance"])) for hit in hits] for hits in found]

  @property
  def _about(self) -> str:
    return f"{self._name}_about"

  def _create(self, name: str, schema) -> None:
    index = self._client.prepare_index_params()
    # Exact. Another index brings nothing in Milvus Lite.
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    self._client.create_collection(
      name, schema=schema, index_params=index, consistency_level="Strong"
    )

  def _refuse_foreign(self, name: str) -> None:
    """Raises UserError unless a collection is one that `create` has begun and not finished."""
    fields = {field["name"] for field in self._client.describe_collection(name)["fields"]}
    self._client.load_collection(name)
    rows = self._query(name, "", ["count(*)"])[0]["count(*)"]
    if rows or not fields.issuperset(_FIELDS):
      raise UserError(
        f"{self.index}: its collection {name} is of another program; choose another --collection"
      )

  def _query(self, collection: str, filter_: str, fields: list[str]) -> list[dict]:
    return list(self._client.query(collection, filter=filter_, output_fields=fields))

  def _get(self, keys: Iterable[str], fields: list[str]) -> Iterator[dict]:
    keys = list(dict.fromkeys(keys))
    for start in range(0, len(keys), _NAMED):
      yield from self._query(self._name, filters.named(keys[start : start + _NAMED]), fields)

  def _pages(self, fields: list[str], size: int) -> Iterator[list[dict]]:
    iterator = self._pages_of(fields, size)
    while page := self._next(iterator):
      yield page
    iterator.close()

  @_in_words
  def _pages_of(self, fields: list[str], size: int):
    return self._client.query_iterator(self._name, batch_size=size, filter="", output_fields=fields)

  @_in_words
  def _next(self, iterator) -> list[dict]:
    return iterator.next()

  def _cannot_open(self, error: pymilvus.MilvusException) -> str:
    why = filters.first_line(error)
    if self.embedded:
      return (
        f"{self.index}: Milvus Lite cannot open it ({why}). Does another program have it open? "
        f"Only one can. Was it written by another version? Then index anew"
      )
    return (
      f"{self.index}: no connection to a Milvus server ({why}). Is it running? Its token is read "
      f"from the environment, {TOKEN}"
    )


def unit(vectors: np.ndarray) -> np.ndarray:
  """[n] bool: which of the vectors [n, dim] have unit length (NaN and zero have not)."""
  # float32 sums of some thousand squares; what is not of unit length is far from it.
  return np.abs(np.linalg.norm(vectors, axis=1) - 1) < 1e-3


def _row(found: dict) -> Row:
  metadata = {k: v for k, v in found.items() if k not in (*_FIELDS, "key", "vector")}
  return Row(**{field: found[field] for field in _FIELDS}, metadata=metadata)
