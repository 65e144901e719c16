"""What a run shows at its end: eval.json, pictures and report.html."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np
from absl import logging

from crn_jax.input_pipeline.dataset import EvalSplit
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.reports import cases, page, tables
from crn_jax.reports.cases import Cases
from crn_jax.reports.pictures import attention, curves, grid
from crn_jax.reports.results import QUERY_KINDS, Results
from crn_jax.retrieval import metrics
from crn_jax.workdir import history, run

_CUT_OFFS = 50  # The recall curve reaches at least to here, if the gallery does.
_DRAWS = 2000  # Resamples of each interval of the recall curve.
_PATTERNS = ("retrieval_*.png", "attention_*.png", "recall_curve.png", "loss_curves.png")


@dataclasses.dataclass(frozen=True)
class _Section:
  """A section of pictures of the page."""

  title: str
  figures: tuple[page.Figure, ...]


def write(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  results: Results,
  ranks: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
  shown: Sequence[Cases],
  vocabulary: Tokenizer,
) -> list[pathlib.Path]:
  """Writes eval.json, the pictures and report.html, and removes pictures of an earlier evaluation.

  A picture that cannot be drawn is left out with a warning: it costs no results.

  Args:
    config: of the run.
    workdir: of the run; metrics.jsonl is read from there.
    results: what was found.
    ranks: split -> protocol -> kind of query -> [queries] 0-based ranks of the targets.
    shown: the queries to show, of every split.
    vocabulary: of the run.

  Returns:
    The paths written.
  """
  workdir = pathlib.Path(workdir)
  folder = workdir / "pictures"
  run.write_json(results.to_json(), workdir / "eval.json")
  sections = [_curves(config, workdir, results, ranks, [c.split for c in shown])]
  for split_cases in shown:
    figures = _grids(folder, split_cases, results)
    figures += _attention(config, folder, split_cases, results, vocabulary)
    sections.append(_Section(f"Queries: {split_cases.split.name}", tuple(figures)))
  written = [workdir / "eval.json"]
  if _drawn(workdir / "report.html", lambda: _page(config, workdir, results, sections)):
    written.append(workdir / "report.html")
  drawn = [figure.path for section in sections for figure in section.figures]
  for pattern in _PATTERNS:
    for path in set(folder.glob(pattern)) - set(drawn):
      path.unlink()
  return [*written, *drawn]


def _page(config, workdir, results: Results, sections: Sequence[_Section]) -> None:
  page.write(
    "report.html",
    workdir / "report.html",
    title=f"{config.name}: composed image retrieval on {results.dataset}",
    summary=tables.describe(results),
    tables=tables.result_tables(results),
    notes=tables.notes(results),
    sections=sections,
    config=run.flat(run.as_json(config)),
    preset=config.preset,
  )


def _drawn(path: pathlib.Path, draw) -> bool:
  """Whether a picture or page could be made; tells why not."""
  try:
    draw()
  except Exception as error:  # Of any library that draws: results matter more.
    logging.warning("%s: not drawn (%s: %s)", path, type(error).__name__, error)
    return False
  return True


def title(split: EvalSplit, protocol: str, results: Results) -> str:
  """What the ranks of a split's pictures mean: everything that changes the numbers."""
  dataset = results.dataset.partition("/")[0]
  name = split.name if split.name == dataset else f"{dataset}/{split.name}"
  return (
    f"{name}: {protocol}, gallery {len(split.galleries[protocol])}, reference "
    f"{'excluded' if results.exclude_reference else 'kept'}, captions {results.captions}, "
    f"{results.describe_selection()}"
  )


def recall_curves(
  config: ml_collections.ConfigDict,
  ranks: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
  splits: Sequence[EvalSplit],
  chosen: str,
) -> list[curves.RecallCurve]:
  """Recall at every cut-off: composed queries in every protocol, then the other kinds of query.

  Over several splits the recalls are means, as in the results. Protocols whose galleries hold the
  same images share a curve, as one would hide the other.

  Args:
    config: the whole configuration.
    ranks: as in `write`.
    splits: all splits that were evaluated.
    chosen: the breakdown protocol.
  """
  same = {  # Protocol -> all those with the same galleries.
    p: [
      q
      for q in splits[0].galleries
      if all(set(s.galleries[p]) == set(s.galleries[q]) for s in splits)
    ]
    for p in splits[0].galleries
  }
  others = [names[0] for p, names in same.items() if names[0] == p and chosen not in names]
  lines = [(p, "composed") for p in (chosen, *others)]
  lines += [(chosen, kind) for kind in QUERY_KINDS if kind != "composed"]
  found = []
  for protocol, kind in lines:
    galleries = [len(s.galleries[protocol]) for s in splits]
    rows = [ranks[s.name][protocol][kind] for s in splits]
    ks = range(1, min(max(_CUT_OFFS, *config.eval.recall_at), *galleries) + 1)
    recalls = np.mean([list(metrics.recall_at_k(r, ks).values()) for r in rows], axis=0)
    intervals = np.asarray([metrics.recall_interval(rows, k, draws=_DRAWS) for k in ks])
    names = " = ".join(same[protocol]) if kind == "composed" else protocol
    label = f"{kind.replace('_', ' ')}, {names} (gallery {sum(galleries)})"
    found.append(curves.RecallCurve(label, recalls, intervals))
  return found


def _curves(config, workdir, results: Results, ranks, splits) -> _Section:
  folder, figures = workdir / "pictures", []

  def recall(path):
    curves.recall_curves(
      recall_curves(config, ranks, splits, results.breakdown_protocol),
      config.eval.recall_at,
      path,
      title=f"{tables.describe(results)}\n{_sentence(results.describe_selection())}",
    )

  path = folder / "recall_curve.png"
  if _drawn(path, lambda: recall(path)):
    figures.append(page.Figure("Recall at every cut-off", path, "dots at the reported ones"))
  recorded = history.read(workdir)
  path = folder / "loss_curves.png"
  title = f"{config.name}, {results.dataset}: course of the training"
  if recorded.metrics("train/") and _drawn(
    path, lambda: curves.training_curves(recorded, path, title=title)
  ):
    note = "losses: means over the steps since the record before; recalls on the evaluation queries"
    figures.append(page.Figure("Course of the training", path, note))
  return _Section("Curves", tuple(figures))


def _grids(folder, shown: Cases, results: Results) -> list[page.Figure]:
  split, ranks = shown.split, shown.ranks
  n_found = int((ranks < cases.TOP).sum())
  kinds = (
    ("all", "", "All queries", f"evenly spread over all {len(ranks)} queries"),
    ("found", "_found", "Found",
     f"evenly spread over the {n_found} queries with the target in the top {cases.TOP}"),
    ("missed", "_missed", "Missed",
     f"of the {len(ranks) - n_found} queries with the target outside the top {cases.TOP}, from "
     "the nearest miss to the farthest"),
  )  # fmt: skip
  figures = []
  for group, suffix, name, how in kinds:
    if not len(shown.groups[group]):
      continue
    path = folder / f"retrieval_{split.name}{suffix}.png"
    heading = f"{title(split, shown.protocol, results)}. Rows: {how}"
    if _drawn(
      path,
      lambda group=group, path=path, heading=heading: grid.retrieval_grid(
        shown.grid_rows(group), path, title=heading
      ),
    ):
      figures.append(page.Figure(name, path, how, rows=_spoken(shown, group)))
  return figures


def _spoken(shown: Cases, group: str) -> tuple[str, ...]:
  """The rows of a grid in words, to be searched and read aloud."""
  return tuple(
    f"{row.text}: target {'not ranked' if row.rank is None else f'at rank {row.rank + 1}'}"
    for row in shown.grid_rows(group)
  )


def _attention(config, folder, shown: Cases, results: Results, vocabulary) -> list[page.Figure]:
  if not shown.attention:
    return []
  split, path = shown.split, folder / f"attention_{shown.split.name}.png"

  def draw():
    rows = shown.attention_rows(vocabulary, config)
    heading = f"Attention. {title(split, shown.protocol, results)}"
    attention.attention_maps(rows, path, title=heading)

  note = "found queries, then missed ones"
  return [page.Figure("Attention", path, note)] if _drawn(path, draw) else []


def _sentence(text: str) -> str:
  return text[:1].upper() + text[1:] + "."
