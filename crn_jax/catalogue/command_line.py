"""--mode=index, search and serve of main.py; starts nothing until one of them is asked for."""

import dataclasses
import importlib.util
import json
import os
import pathlib

from absl import flags

from crn_jax.errors import UserError

MODES = ("index", "search", "serve")

_INDEX = flags.DEFINE_string(
  "index", None, "Catalogue: a folder NAME.db, or http://host:port of a Milvus server."
)
_COLLECTION = flags.DEFINE_string("collection", "catalogue", "Name of the catalogue in --index.")
_MODEL = flags.DEFINE_string(
  "model", None, "Folder of a trained run; --mode=search knows that of the index."
)
_IMAGES = flags.DEFINE_string(
  "images", None, "What --mode=index indexes: a folder, or a .csv or .jsonl that lists pictures."
)
_IMAGE = flags.DEFINE_string("image", None, "Picture that --mode=search starts from.")
_TEXT = flags.DEFINE_string("text", "", "How what is searched differs from the picture, or looks.")
_ID = flags.DEFINE_string("id", None, "In place of --image: a picture of the catalogue.")
_FILTER = flags.DEFINE_string(
  "filter", "", "Which pictures may be found, e.g. 'kind == \"dress\" and price < 50'."
)
_K = flags.DEFINE_integer("k", 10, "How many pictures --mode=search finds.")
_MIN_SCORE = flags.DEFINE_float("min_score", None, "Pictures that score less are left out.")
_GRID = flags.DEFINE_string("grid", None, "PNG to draw what --mode=search finds into.")
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address at which --mode=serve listens: as it is, for this machine only."
)
_PORT = flags.DEFINE_integer("port", 7860, "Port of --mode=serve; 0 takes a free one.")
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size",
  16,
  "Queries that --mode=serve answers at a time; smaller answers a single one sooner where the "
  "model is large and there is no GPU.",
  lower_bound=1,
)

# See main.py.
ONLY_WITH = {
  **dict.fromkeys(("index", "collection", "model"), MODES),
  "images": ("index",),
  **dict.fromkeys(("image", "text", "id", "filter", "k", "min_score", "grid"), ("search",)),
  **dict.fromkeys(("host", "port", "batch_size"), ("serve",)),
}

_SHOWN = 20  # Skipped pictures that are listed.


def run(mode: str, compilation_cache: str | None, *, as_json: bool) -> str:
  """What a mode finds or has done, for people to read, or as JSON.

  Args:
    mode: one of `MODES`.
    compilation_cache: see `compilation_cache.enable`.
    as_json: whether to give JSON.

  Raises:
    UserError: a flag is missing or unfit; whatever indexing and searching raise.
    Interrupted: indexing was stopped.
  """
  needed = {"index": (_INDEX, _MODEL, _IMAGES)}.get(mode, (_INDEX,))
  examples = {"index": "catalogue.db", "model": "runs/demo_crn", "images": "my_pictures"}
  for flag in needed:
    if not flag.value:
      example = f"--{flag.name}={examples[flag.name]}"
      raise UserError(f"--mode={mode} needs --{flag.name}, e.g. {example}")
  if mode == "serve":
    _check_extra()
  from crn_jax import compilation_cache as cache  # Starts JAX.

  cache.enable(compilation_cache)
  if mode == "serve":
    return _serve()
  return _index(as_json) if mode == "index" else _search(as_json)


def _index(as_json: bool) -> str:
  from crn_jax.catalogue import encoders, indexing, model
  from crn_jax.catalogue.store import Store
  from crn_jax.workdir.interrupt import Interrupted, Interruption

  indexing.sources(_IMAGES.value)  # Before the model is loaded, which takes seconds.
  with Interruption("batch") as stop:
    ready = encoders.Encoders(model.load(_MODEL.value))
    with Store(_INDEX.value, _COLLECTION.value, create=True) as store:
      report = indexing.update(
        store, ready, _IMAGES.value, stopped=lambda: stop.signal is not None
      )  # fmt: skip
  if not report.complete:
    raise Interrupted(report.total, stop.signal, unit="picture")
  return json.dumps(dataclasses.asdict(report)) if as_json else _described(report)


def _described(report) -> str:
  rate = f" ({report.encoded / report.seconds:,.0f} pictures/s)" if report.encoded else ""
  lines = [
    f"{_INDEX.value}: {report.total:,} pictures",
    f"  {report.written:,} new or changed, {report.encoded:,} of them encoded; "
    f"{report.described:,} described anew; {report.unchanged:,} unchanged; "
    f"{report.removed:,} removed; {report.seconds:,.0f} s{rate}",
  ]
  if report.skipped:
    lines.append(f"  {len(report.skipped):,} skipped:")
    lines += [f"    {skipped.path}: {skipped.reason}" for skipped in report.skipped[:_SHOWN]]
    if len(report.skipped) > _SHOWN:
      lines.append(f"    and {len(report.skipped) - _SHOWN:,} more; --json lists them all")
  lines.append("Search it with")
  lines.append(f"  python main.py --mode=search --index={_INDEX.value} --image=PICTURE --text=TEXT")
  return "\n".join(lines)


def _search(as_json: bool) -> str:
  from crn_jax.catalogue.retriever import Query, Retriever

  with Retriever.open(_INDEX.value, model=_MODEL.value, collection=_COLLECTION.value) as retriever:
    query = Query(_IMAGE.value, _TEXT.value, _ID.value, _FILTER.value)
    hits = retriever.query(
      query.image, query.text, _K.value, query.filter, id=query.id, min_score=_MIN_SCORE.value
    )
    unknown = retriever.unknown_words(query.text)
    reference = query.image if query.id is None else retriever.get(query.id).path
  drawn = _draw(reference, query.text, hits) if _GRID.value else None
  if as_json:
    asked = {"image": query.image, "id": query.id, "text": query.text, "filter": query.filter}
    found = {
      "query": asked,
      "unknown_words": unknown,
      "hits": [dataclasses.asdict(h) for h in hits],
    }
    return json.dumps(found | ({"grid": drawn} if drawn else {}))
  lines = [_table(hits)] if hits else ["nothing found"]
  if unknown:
    lines.append(
      f"words that the model has not learned, and cannot tell apart: {', '.join(unknown)}"
    )
  if drawn:
    lines.append(f"written {drawn}")
  return "\n".join(lines)


def _check_extra() -> None:
  if importlib.util.find_spec("gradio") is None:
    raise UserError(
      "--mode=serve needs Gradio, which is not installed: pip install 'crn-jax[serve]', or "
      "pip install -e '.[serve]' in a checkout"
    )


def _serve() -> str:
  from crn_jax.catalogue.page import server
  from crn_jax.catalogue.retriever import Retriever

  # Before the model is loaded, which takes seconds.
  with server.listening(_HOST.value, _PORT.value):
    pass
  with Retriever.open(
    _INDEX.value, model=_MODEL.value, collection=_COLLECTION.value, batch_size=_BATCH_SIZE.value
  ) as retriever:
    retriever.warm()
    server.serve(retriever, _name(), _HOST.value, _PORT.value)
  return "ended"


def _name() -> str:
  """The catalogue's, for people."""
  from crn_jax.catalogue.store import is_server

  return _COLLECTION.value if is_server(_INDEX.value) else pathlib.Path(_INDEX.value).stem


def _table(hits) -> str:
  from crn_jax.catalogue.pictures import printable

  names = list(dict.fromkeys(name for hit in hits for name in hit.metadata))
  rows = [["rank", "score", "id", *names]]
  for rank, hit in enumerate(hits, 1):
    values = [str(hit.metadata.get(name, "")) for name in names]
    rows.append([str(rank), f"{hit.score:.3f}", *(printable(v) for v in (hit.id, *values))])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  aligned = [
    [
      *(cell.rjust(width) for cell, width in zip(row[:2], widths[:2], strict=True)),
      *(cell.ljust(width) for cell, width in zip(row[2:], widths[2:], strict=True)),
    ]
    for row in rows
  ]
  return "\n".join("  ".join(row).rstrip() for row in aligned)


def _draw(reference: str | None, text: str, hits) -> str:
  from crn_jax.reports.pictures import grid

  row = grid.GridRow(
    reference=reference and _upright(reference),
    text=text,
    top=tuple((_upright(hit.path), hit.score) for hit in hits),
    target=None,
    target_position=None,
    rank=None,
  )
  path = os.path.expanduser(_GRID.value)
  restricted = f", {_FILTER.value}" if _FILTER.value else ""
  grid.retrieval_grid([row], path, title=f"{_INDEX.value}{restricted}")
  return path


def _upright(path: str):
  """The picture as it was indexed; its path, which is drawn as unreadable, if it is not there."""
  from crn_jax.catalogue import pictures

  try:
    return pictures.decode(pictures.read_file(os.path.expanduser(path)))
  except pictures.Unreadable:
    return path
