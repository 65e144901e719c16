"""Asks a catalogue: by a picture, a text or both, "this, but ..."."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from crn_jax.catalogue import encoders, indexing, pictures, rankers
from crn_jax.catalogue import model as models
from crn_jax.catalogue.store import COLLECTION, MAX_K, About, Row, Store, key_of, unit
from crn_jax.errors import UserError

# Pictures of an embedded catalogue whose rows are kept: nobody can change them meanwhile.
_ROWS = 20_000

# Scores closer than this are equal: the last bits depend on who multiplied. Of equal pictures the
# one with the smaller id comes first; so many more than asked for are ranked to find it.
_DECIMALS, _SPARE = 6, 8

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True)
class Query:
  """What is looked for: a picture (`image` or `id`), a text, or a picture changed as a text says.

  Attributes:
    image: path of a file, bytes of one (at most `pictures.MAX_UPLOAD`), a Pillow image or
      [h, w, 3] uint8.
    text: modification, or description if there is no picture; "" for none.
    id: of a picture of the catalogue, in place of `image`. It is no answer to its own query.
    filter: an expression of Milvus over the metadata, e.g. 'kind == "dress"'; "" for all pictures.
      `filters.equals` writes one for any value.
  """

  image: Picture | None = None
  text: str = ""
  id: str | None = None
  filter: str = ""


@dataclasses.dataclass(frozen=True)
class Hit:
  """A picture that was found.

  Attributes:
    id, path: of the picture.
    score: cosine with the query, in [-1, 1].
    width, height: of the picture in pixels.
    metadata: name -> value.
  """

  id: str
  path: str
  score: float
  width: int
  height: int
  metadata: pictures.Metadata


@dataclasses.dataclass(frozen=True)
class Attention:
  """Where in the reference the model looks for the words of a text.

  Attributes:
    words: as the model read them, markers included; of long texts as many as it reads.
    roles: of each word: "marker", "unknown", or "" for one that says something.
    picture: [S, S, 3] uint8, the square that the model sees of the picture.
    maps: part -> [words, h, w] float32, over that square.
    notes: part -> what its weights sum to one over, and what they say.
  """

  words: list[str]
  roles: list[str]
  picture: np.ndarray
  maps: dict[str, np.ndarray]
  notes: dict[str, tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class _Prepared:
  """A checked query: its picture for the model, or its finished vector."""

  query: Query
  text: str
  picture: np.ndarray | None = None
  vector: np.ndarray | None = None


class Retriever:
  """An open catalogue and its model; several threads may ask it. Closed by `close` or `with`.

  Attributes:
    about: what the catalogue says of itself: model, facets for filters.
    batch_size: queries of the compiled program.
  """

  def __init__(self, store: Store, about: About, loaded: models.Model, batch_size: int):
    """Use `open`."""
    self.about, self.batch_size = about, batch_size
    self._store, self._rows = store, {}
    self._encoders = encoders.Encoders(loaded)
    self._ranker = rankers.create(store, about, batch_size)
    self._pool = concurrent.futures.ThreadPoolExecutor()  # Of decoders.

  @classmethod
  def open(
    cls,
    index: str | os.PathLike,
    *,
    model: str | os.PathLike | None = None,
    collection: str = COLLECTION,
    batch_size: int = 1,
  ) -> "Retriever":
    """Opens a catalogue that `--mode=index` has made.

    Args:
      index: its folder NAME.db, or http(s)://host:port of a Milvus server, whose token is read from
        $MILVUS_TOKEN.
      model: folder of its model; None is where it was when it was indexed.
      collection: name in the store.
      batch_size: queries that are answered at a time, by one compiled program; fewer are filled up
        to it. 16 suits a server of small models.

    Raises:
      UserError: there is no such catalogue or model, another process holds it, or the model is
        another one.
    """
    with contextlib.ExitStack() as undo:
      store = undo.enter_context(Store(index, collection))
      about = store.about()
      if about is None:
        raise UserError(f"{index}: holds no catalogue {collection}; make it with --mode=index")
      loaded = models.load(model or about.model)
      indexing.check_model(about, loaded, str(index))
      if store.embedded:
        store.flush()  # What a killed process has left.
      retriever = cls(store, about, loaded, batch_size)
      undo.pop_all()
    return retriever

  def __enter__(self) -> "Retriever":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    self._pool.shutdown()
    self._store.close()

  def __len__(self) -> int:
    """Number of pictures."""
    return self._store.count()

  def query(
    self,
    image: Picture | None = None,
    text: str | None = None,
    k: int = 10,
    filter: str | None = None,
    *,
    id: str | None = None,
    min_score: float | None = None,
  ) -> list[Hit]:
    """The k best pictures, best first; see `Query` for the arguments.

    Args:
      image: reference picture.
      text: modification or description.
      k: how many, 1 to 1,000.
      filter: expression over the metadata.
      id: of a picture of the catalogue, in place of `image`.
      min_score: pictures that score less are left out.

    Raises:
      UserError: neither picture nor text, a picture that cannot be read, an unknown id, a filter
        that is none.
    """
    query = Query(image=image, text=text or "", id=id, filter=filter or "")
    (found,) = self.query_batch([query], k, min_score=min_score)
    if isinstance(found, UserError):
      raise found
    return found

  def query_batch(
    self, queries: Sequence[Query], k: int = 10, *, min_score: float | None = None
  ) -> list[list[Hit] | UserError]:
    """As `query` for many at a time, `batch_size` of them by one run of a program.

    What is wrong with one query does not touch the others: its answer is the error.

    Args:
      queries: any number.
      k: how many pictures each, 1 to 1,000.
      min_score: pictures that score less are left out.

    Raises:
      UserError: an unfit k; a model that gives vectors that are not finite.
    """
    if not 1 <= k <= MAX_K:
      raise UserError(f"k: expected 1 to {MAX_K:,}, got {k}")
    answers: list[list[Hit] | UserError] = []
    for start in range(0, len(queries), self.batch_size):
      answers += self._answer(queries[start : start + self.batch_size], k, min_score)
    return answers

  def attention(self, query: Query) -> Attention | None:
    """Where the model looks; None without picture or text, or for a model without attention."""
    prepared = self._prepare(query, for_attention=True)
    if prepared.picture is None or not prepared.text:
      return None
    answers = self._encoders.answer([prepared.picture], [prepared.text], self.batch_size)
    if not answers.attention:
      return None
    tokenizer = self._encoders.model.tokenizer
    read = tokenizer.read((prepared.text,))
    maps = {part: maps[0, : len(read)] for part, maps in answers.attention.items()}
    read = read[: len(next(iter(maps.values())))]
    words, roles = [word for word, _ in read], [tokenizer.role(i) for _, i in read]
    return Attention(words, roles, prepared.picture, maps, dict(self._notes))

  @property
  def attends(self) -> bool:
    """Whether the model can say where it looks."""
    return bool(self._notes)

  def unknown_words(self, text: str) -> list[str]:
    """Words of a text that the model has not learned: all of them are one and the same to it."""
    tokenizer = self._encoders.model.tokenizer
    if not text.strip():
      return []
    read = tokenizer.read((text,))
    return list(dict.fromkeys(word for word, i in read if tokenizer.role(i) == "unknown"))

  def get(self, id: str) -> Row:
    """What is known of a picture of the catalogue.

    Raises:
      UserError: there is none with this id.
    """
    key = key_of(id)
    found = self._get({key})
    if key not in found:
      raise UserError(f"id {id!r}: no such picture in the catalogue")
    return found[key]

  def sample(self, n: int, filter: str = "") -> list[Row]:
    """n pictures of the catalogue, drawn once and for all, to begin with."""
    return self._store.sample(n, filter)

  def warm(self) -> None:
    """Compiles what queries need, before the first one comes."""
    self.query_batch([Query(image=self._encoders.empty_picture, text="x")])

  @property
  def _notes(self):
    return self._encoders.model.method.attention_notes

  def _answer(self, queries, k: int, min_score: float | None) -> list[list[Hit] | UserError]:
    """Of up to `batch_size` queries."""
    prepared = list(self._pool.map(self._prepare_or_error, queries))
    good = [p for p in prepared if isinstance(p, _Prepared)]
    vectors = self._vectors(good)
    if not unit(vectors).all():
      raise UserError(f"{self.about.model}: the model gives no finite vector; was it trained well?")
    rankings = self._rank_or_errors(vectors, [p.query.filter for p in good], k)
    rankings = [
      r if isinstance(r, UserError) else _best(p.query, r, k)
      for p, r in zip(good, rankings, strict=True)
    ]
    rows = self._get({key for r in rankings if not isinstance(r, UserError) for key, _ in r})
    found = iter(r if isinstance(r, UserError) else _hits(r, rows, k, min_score) for r in rankings)
    return [next(found) if isinstance(p, _Prepared) else p for p in prepared]

  def _get(self, keys: set[str]) -> dict[str, Row]:
    if not self._store.embedded:
      return self._store.get(keys)
    kept = self._rows  # Replaced as a whole, as several threads ask.
    if missing := keys - kept.keys():
      kept = {k: kept[k] for k in keys - missing} | self._store.get(missing)
      self._rows = (self._rows if len(self._rows) < _ROWS else {}) | kept
    return kept

  def _prepare_or_error(self, query: Query) -> _Prepared | UserError:
    try:
      return self._prepare(query)
    except UserError as error:
      return error

  def _prepare(self, query: Query, *, for_attention: bool = False) -> _Prepared:
    text = encoders.check_text(query.text)
    if query.image is not None and query.id is not None:
      raise UserError("give a picture as image or by its id, not both")
    if query.image is not None:
      return _Prepared(query, text, picture=self._encoders.fit(_read(query.image)))
    if query.id is not None:
      row = self.get(query.id)
      if text or for_attention:
        return _Prepared(query, text, picture=self._encoders.fit(_read_row(row)))
      return _Prepared(query, text, vector=self._store.get_vectors([row.key])[row.key])
    if not text:
      raise UserError("nothing to look for: give a picture, a text, or both")
    return _Prepared(query, text)

  def _vectors(self, prepared: Sequence[_Prepared]) -> np.ndarray:
    """[n, dim] of queries; those that need the model go through it together."""
    vectors = np.zeros((len(prepared), self.about.dim), np.float32)
    due = [i for i, p in enumerate(prepared) if p.vector is None]
    if due:
      empty = self._encoders.empty_picture
      given = [prepared[i].picture for i in due]
      shown = [empty if picture is None else picture for picture in given]
      texts = [prepared[i].text for i in due]
      answers = self._encoders.answer(shown, texts, self.batch_size)
      for row, (i, picture, text) in enumerate(zip(due, given, texts, strict=True)):
        of_kind = answers.text if picture is None else answers.composed if text else answers.image
        vectors[i] = of_kind[row]
    for i, p in enumerate(prepared):
      if p.vector is not None:
        vectors[i] = p.vector
    return vectors

  def _rank_or_errors(
    self, vectors: np.ndarray, filters: list[str], k: int
  ) -> list[rankers.Ranking | UserError]:
    """Rankings; a filter that is none spoils its own query only."""
    if not filters:
      return []
    try:
      return self._rank(vectors, filters, k)
    except UserError as error:
      if len(filters) == 1:
        return [error]
      alone = zip(vectors[:, None], filters, strict=True)
      return [self._rank_or_errors(vector, [filter_], k)[0] for vector, filter_ in alone]

  def _rank(self, vectors: np.ndarray, filters: list[str], k: int) -> list[rankers.Ranking]:
    # In powers of two, so that few programs are compiled.
    return self._ranker.rank(vectors, 1 << (k + _SPARE).bit_length(), filters)


def _best(query: Query, ranking: rankers.Ranking, k: int) -> rankers.Ranking:
  """The k best, and those that score like the last of them; never the reference itself."""
  own = None if query.id is None else key_of(query.id)
  others = [(key, score) for key, score in ranking if key != own]
  least = round(others[k - 1][1], _DECIMALS) if len(others) > k else -np.inf
  return [(key, score) for key, score in others if round(score, _DECIMALS) >= least]


def _hits(
  ranking: rankers.Ranking, rows: dict[str, Row], k: int, min_score: float | None
) -> list[Hit]:
  hits = [
    Hit(row.id, row.path, score, row.width, row.height, row.metadata)
    for key, score in ranking
    if (row := rows.get(key))  # On a server it may be gone meanwhile.
  ]
  hits.sort(key=lambda hit: (-round(hit.score, _DECIMALS), hit.id))
  return [hit for hit in hits[:k] if min_score is None or hit.score >= min_score]


def _read(image: Picture) -> np.ndarray:
  """A reference picture as [h, w, 3] uint8.

  Raises:
    UserError: it cannot be read; says which and why.
  """
  name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else "the picture"
  try:
    if isinstance(image, np.ndarray):
      if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise pictures.Unreadable(
          f"expected [h, w, 3] uint8, got {list(image.shape)} {image.dtype}"
        )
      return pictures.of_image(Image.fromarray(image))
    if isinstance(image, Image.Image):
      return pictures.of_image(image)
    if isinstance(image, bytes):
      if len(image) > pictures.MAX_UPLOAD:
        raise pictures.Unreadable(f"larger than {pictures.MAX_UPLOAD / 1e6:,.0f} MB")
      return pictures.decode(image)
    return pictures.decode(pictures.read_file(os.path.expanduser(name)))
  except pictures.Unreadable as error:
    raise UserError(f"{pictures.printable(str(name))}: {error}") from error


def _read_row(row: Row) -> np.ndarray:
  """The picture of a row, if its file is still the one that was indexed."""
  try:
    content = pictures.read_file(row.path)
    if hashlib.sha256(content).hexdigest() != row.digest:
      raise pictures.Unreadable("changed since it was indexed; run --mode=index again")
    return pictures.decode(content)
  except pictures.Unreadable as error:
    # Not the path: who asks a server is not to learn where its files lie.
    raise UserError(f"{row.id}: {error}") from error
