"""Brings a catalogue up to date with its pictures: encodes what is new, removes what is gone.

What a picture is, is its content: a file that was renamed, or that is there twice, is encoded once.
After every batch what was done is safe; the next run goes on from there.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from crn_jax.catalogue import manifest, model, pictures, progress
from crn_jax.catalogue.encoders import Encoders
from crn_jax.catalogue.pictures import Skipped, Source
from crn_jax.catalogue.store import About, Row, Store, key_of, unit
from crn_jax.errors import UserError

# Pictures that are encoded and written at a time, which an interruption loses at most.
BATCH_SIZE = 32

# Values of a text that are offered to choose from; fields with more are free text.
_MAX_VALUES, _MAX_VALUE = 50, 100


@dataclasses.dataclass
class Report:
  """What a run has done, in pictures.

  Attributes:
    total: that the catalogue has now.
    written: that are new, or new in content.
    encoded: that went through the model for that; the content of others was known.
    described: of which only path or metadata are new.
    unchanged, removed: that stayed, that went.
    skipped: that could not be read.
    seconds: that it took, without loading the model.
    complete: whether all pictures were looked at; if not, nothing was removed.
  """

  total: int = 0
  written: int = 0
  encoded: int = 0
  described: int = 0
  unchanged: int = 0
  removed: int = 0
  skipped: list[Skipped] = dataclasses.field(default_factory=list)
  seconds: float = 0.0
  complete: bool = False


@dataclasses.dataclass(frozen=True)
class _Read:
  """A file that was read: its row, and the fitted picture if its content was not known."""

  row: Row
  picture: np.ndarray | None


# Width and height of a picture in pixels, and its vector.
_Content = tuple[tuple[int, int], np.ndarray]


def sources(images: str | os.PathLike) -> tuple[list[Source], list[Skipped]]:
  """The pictures of a folder or of a manifest.

  Raises:
    UserError: there is nothing there, or a manifest cannot be used.
  """
  path = pathlib.Path(images).expanduser().absolute()
  if path.is_dir():
    found, skipped = pictures.walk(path)
  elif path.is_file() and path.suffix.lower() in manifest.SUFFIXES:
    found, skipped = manifest.read(path), []
  else:
    what = "no such folder or file" if not path.exists() else "neither a folder nor a manifest"
    raise UserError(
      f"{images}: {what}; expected a folder of pictures, or a list of them that ends in "
      f".csv or .jsonl"
    )
  if not found:
    # Else a mistyped folder would empty the catalogue.
    raise UserError(f"{images}: no pictures in it ({', '.join(pictures.SUFFIXES)})")
  return found, skipped


def update(
  store: Store,
  encoders: Encoders,
  images: str | os.PathLike,
  *,
  batch_size: int = BATCH_SIZE,
  stopped: Callable[[], bool] = lambda: False,
) -> Report:
  """Brings a catalogue up to date; made if there is none yet.

  Args:
    store: of the catalogue.
    encoders: of the model.
    images: see `sources`.
    batch_size: pictures of a batch.
    stopped: asked after every batch whether to leave; see `Report.complete`.

  Raises:
    UserError: the catalogue is of another model, no picture can be read, or the model's vectors are
      not finite.
  """
  start = time.monotonic()
  found, skipped = sources(images)
  work = _Work(store, encoders, _begin(store, encoders.model), batch_size)
  report = work.report
  report.skipped += skipped
  try:
    with progress.Progress(len(found), "index") as shown:
      for outcomes in _batches(found, work.read, batch_size):
        work.finish(outcomes)
        shown.advance(len(outcomes))
        if stopped():
          break
      else:
        report.complete = True
    if report.complete:
      if not work.seen:
        first = report.skipped[0]
        raise UserError(
          f"{images}: none of the {len(found):,} pictures can be read; the first is "
          f"{first.path}: {first.reason}"
        )
      work.remove_gone()
      work.describe(facets([s.metadata for s in found if key_of(s.id) in work.seen]))
  finally:
    store.flush()
  report.total, report.seconds = store.count(), time.monotonic() - start
  return report


def _batches(
  found: Sequence[Source], read: Callable[[Source], "_Read | Skipped"], size: int
) -> Iterator[list["_Read | Skipped"]]:
  """What reading gives, in order and in batches; in threads, a batch ahead."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    ahead = collections.deque()
    for start in range(0, len(found), size):
      ahead.append([pool.submit(read, source) for source in found[start : start + size]])
      if len(ahead) > 1:
        yield [future.result() for future in ahead.popleft()]
    while ahead:
      yield [future.result() for future in ahead.popleft()]


def facets(metadata: Sequence[pictures.Metadata]) -> dict:
  """What filters can be made of metadata.

  Returns:
    name -> {"least", "greatest"} of numbers, {"values": [...]} of texts of which there are few,
    true and false, {} of others.
  """
  values = collections.defaultdict(set)
  for entry in metadata:
    for name, value in entry.items():
      values[name].add(value if isinstance(value, str) else (type(value).__name__, value))
  return {name: _facet(found) for name, found in sorted(values.items())}


def _facet(found: set) -> dict:
  texts = [value for value in found if isinstance(value, str)]
  others = [value for kind, value in (v for v in found if not isinstance(v, str))]
  if texts and others:
    return {}
  if texts:
    few = len(texts) <= _MAX_VALUES and all(len(text) <= _MAX_VALUE for text in texts)
    return {"values": sorted(texts)} if few else {}
  if all(isinstance(value, bool) for value in others):
    return {"values": sorted(others)}
  if any(isinstance(value, bool) for value in others):
    return {}
  return {"least": min(others), "greatest": max(others)}


def check_model(about: About, found: model.Model, index: str) -> None:
  """Raises UserError unless a model is the one that a catalogue was made with."""
  if about.digest != found.digest:
    raise UserError(
      f"{index}: made with another model ({about.model}, digest {about.digest[:12]}) than "
      f"{found.path} (digest {found.digest[:12]}), whose vectors cannot be compared. Give that one "
      f"with --model, or choose another --index"
    )


def _begin(store: Store, found: model.Model) -> About:
  about = store.about()
  if about is None:
    about = About(found.path, found.digest, found.method.vector_dim, uuid.uuid4().hex)
    store.create(about)
  check_model(about, found, store.index)
  return about


class _Work:
  """What is known of the store while it changes; no vectors, and a few hundred bytes a row."""

  def __init__(self, store: Store, encoders: Encoders, about: About, batch_size: int):
    self.store, self.encoders, self.about = store, encoders, about
    self.batch_size = batch_size
    self.report = Report()
    self.seen: set[str] = set()
    self.stored: dict[str, tuple[str, bytes]] = {}  # key -> digest, fingerprint of the rest.
    self.holder: dict[str, str] = {}  # digest -> key of a row with this content.
    self._changed = False
    for row in store.rows():
      self._note(row)

  def read(self, source: Source) -> _Read | Skipped:
    """Reads a file, and its picture where no row has its content; in threads."""
    try:
      content = pictures.read_file(source.path)
      digest = hashlib.sha256(content).hexdigest()
      if digest in self.holder:
        row = Row(source.id, source.path, digest, len(content), 0, 0, source.metadata)
        return _Read(row, None)
      return self._decoded(source, digest, content)
    except pictures.Unreadable as error:
      return Skipped(pictures.printable(source.path), str(error))

  def _decoded(self, source: Source, digest: str, content: bytes) -> _Read:
    picture = pictures.decode(content)
    height, width = picture.shape[:2]
    row = Row(source.id, source.path, digest, len(content), width, height, source.metadata)
    return _Read(row, self.encoders.fit(picture))

  def finish(self, outcomes: Sequence[_Read | Skipped]) -> None:
    """Encodes and writes a batch."""
    due = []
    for outcome in outcomes:
      if isinstance(outcome, _Read) and not (
        self._is_known(outcome) or outcome.picture is not None
      ):
        # The row that had its content was overwritten since it was read.
        row = outcome.row
        outcome = self.read(Source(row.id, row.path, row.metadata))
      if isinstance(outcome, Skipped):
        self.report.skipped.append(outcome)
      elif self.stored.get(outcome.row.key) == (outcome.row.digest, _fingerprint(outcome.row)):
        self.report.unchanged += 1
        self.seen.add(outcome.row.key)
      else:
        due.append(outcome)
    contents = self._stored_contents(due) | self._encoded_contents(due)
    rows = [
      dataclasses.replace(read.row, width=size[0], height=size[1])
      for read in due
      if (size := contents.get(read.row.digest, (None,))[0])
    ]
    if rows:
      self._write(rows, np.stack([contents[row.digest][1] for row in rows]))

  def _is_known(self, read: _Read) -> bool:
    return read.row.digest in self.holder

  def _stored_contents(self, due: Sequence[_Read]) -> dict[str, _Content]:
    """Those of the batch that a row has already, by digest."""
    keys = {r.row.digest: self.holder[r.row.digest] for r in due if self._is_known(r)}
    rows, vectors = self.store.get(keys.values()), self.store.get_vectors(keys.values())
    return {d: ((rows[k].width, rows[k].height), vectors[k]) for d, k in keys.items()}

  def _encoded_contents(self, due: Sequence[_Read]) -> dict[str, _Content]:
    """Those of the batch that are new, by digest."""
    new = {r.row.digest: r for r in due if not self._is_known(r)}
    if not new:
      return {}
    vectors = self.encoders.image_vectors([r.picture for r in new.values()], self.batch_size)
    good = dict(zip(new, unit(vectors), strict=True))
    if not any(good.values()):
      raise UserError(
        f"{self.encoders.model.path}: the model gives no finite vectors, first of "
        f"{next(iter(new.values())).row.path}; nothing is stored of them. Was its training sound?"
      )
    self.report.encoded += int(sum(good.values()))
    self.report.skipped += [
      Skipped(pictures.printable(r.row.path), "the model gives it no finite vector")
      for r in due
      if not good.get(r.row.digest, True)
    ]
    return {
      digest: ((read.row.width, read.row.height), vector)
      for (digest, read), vector in zip(new.items(), vectors, strict=True)
      if good[digest]
    }

  def _write(self, rows: Sequence[Row], vectors: np.ndarray) -> None:
    self._change()
    self.store.write(rows, vectors, [row.key for row in rows if row.key in self.stored])
    for row in rows:
      if self.stored.get(row.key, ("",))[0] == row.digest:
        self.report.described += 1
      else:
        self.report.written += 1
      self._note(row)
      self.seen.add(row.key)

  def remove_gone(self) -> None:
    gone = [key for key in self.stored if key not in self.seen]
    if gone:
      self._change()
      self.store.delete(gone)
      self.report.removed = len(gone)

  def describe(self, found: dict) -> None:
    """Writes the facets and, should it have moved, the place of the model."""
    self._put(dataclasses.replace(self.about, facets=found, model=self.encoders.model.path))

  def _change(self) -> None:
    """Before the first change: whatever was derived from the rows is of another generation."""
    if not self._changed:
      self._put(dataclasses.replace(self.about, generation=uuid.uuid4().hex))
      self._changed = True

  def _put(self, about: About) -> None:
    if about != self.about:
      self.store.describe(about)
      self.about = about

  def _note(self, row: Row) -> None:
    before = self.stored.get(row.key)
    if before is not None and self.holder.get(before[0]) == row.key:
      del self.holder[before[0]]
    self.stored[row.key] = (row.digest, _fingerprint(row))
    self.holder[row.digest] = row.key


def _fingerprint(row: Row) -> bytes:
  """Of what a row says beside its content."""
  said = json.dumps([row.path, dict(row.metadata)], sort_keys=True)
  return hashlib.sha256(said.encode()).digest()[:16]
