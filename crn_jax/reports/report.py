"""What a run shows at its end: eval.json, pictures and report.html."""

import dataclasses
import os
import pathlib

import ml_collections
import numpy as np

from crn_jax import evaluate
from crn_jax.evaluate import Evaluation
from crn_jax.input_pipeline.dataset import Dataset, EvalSplit
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.reports import cases, page, tables
from crn_jax.reports.pictures import attention, curves, grid
from crn_jax.retrieval import ranking
from crn_jax.retrieval.encode import Encoder
from crn_jax.workdir import history, run

_ROWS = 8  # Queries of a retrieval grid.
_ATTENDED = 2  # Queries of a picture of attention: so many found and as many missed.
_CUT_OFFS = 50  # The recall curve reaches at least to here, if the gallery does.
_DRAWS = 2000  # Resamples of each interval of the recall curve.
_PATTERNS = ("retrieval_*.png", "attention_*.png", "recall_curve.png", "loss_curves.png")


@dataclasses.dataclass(frozen=True)
class _Section:
  """A section of pictures of the page."""

  title: str
  figures: tuple[page.Figure, ...]


def write(
  encoder: Encoder,
  variables,
  vocabulary: Vocabulary,
  workdir: str | os.PathLike,
  dataset: Dataset,
  evaluation: Evaluation,
) -> list[pathlib.Path]:
  """Writes eval.json, the pictures and report.html, and removes pictures of an earlier evaluation.

  Args:
    encoder: compiled encoders; its configuration is the run's.
    variables: those evaluated, placed by the encoder's `parallel.replicate`.
    vocabulary: of the run.
    workdir: of the run; metrics.jsonl is read from there.
    dataset: what was evaluated on.
    evaluation: what was found.

  Returns:
    The paths written.
  """
  config, workdir, results = encoder.config, pathlib.Path(workdir), evaluation.results
  folder = workdir / "pictures"
  run.write_json(results, workdir / "eval.json")
  sections = [_curves(config, workdir, dataset, evaluation)]
  for split in dataset.evals:
    figures = _grids(config, folder, split, evaluation)
    figures.append(_attention(encoder, variables, vocabulary, folder, split, evaluation))
    sections.append(_Section(f"Queries: {split.name}", tuple(figures)))
  page.write(
    "report.html",
    workdir / "report.html",
    title=f"{config.name}: composed image retrieval on {results['dataset']}",
    summary=tables.describe(results),
    tables=tables.result_tables(results),
    notes=tables.notes(results),
    sections=sections,
    config=run.flat(run.as_json(config)),
    preset=config.preset,
  )
  drawn = [figure.path for section in sections for figure in section.figures]
  for pattern in _PATTERNS:
    for path in set(folder.glob(pattern)) - set(drawn):
      path.unlink()
  return [workdir / "eval.json", workdir / "report.html", *drawn]


def title(split: EvalSplit, protocol: str, results: dict) -> str:
  """What the ranks of a split's pictures mean: everything that changes the numbers."""
  dataset = results["dataset"].partition("/")[0]
  name = split.name if split.name == dataset else f"{dataset}/{split.name}"
  return (
    f"{name}: {protocol}, gallery {len(split.galleries[protocol])}, reference "
    f"{'excluded' if results['exclude_reference'] else 'kept'}, captions {results['captions']}, "
    f"{evaluate.describe_selection(results)}"
  )


def recall_curves(
  config: ml_collections.ConfigDict, evaluation: Evaluation, dataset: Dataset
) -> list[curves.RecallCurve]:
  """Recall at every cut-off: composed queries in every protocol, then the other kinds of query.

  Over several splits the recalls are means, as in the results. Protocols whose galleries hold the
  same images share a curve, as one would hide the other.
  """
  chosen = evaluate.breakdown_protocol(config)
  same = {  # Protocol -> all those with the same galleries.
    p: [
      q
      for q in dataset.evals[0].galleries
      if all(set(s.galleries[p]) == set(s.galleries[q]) for s in dataset.evals)
    ]
    for p in dataset.evals[0].galleries
  }
  others = [names[0] for p, names in same.items() if names[0] == p and chosen not in names]
  lines = [(p, "composed") for p in (chosen, *others)]
  lines += [(chosen, kind) for kind in evaluate.QUERY_KINDS if kind != "composed"]
  found = []
  for protocol, kind in lines:
    galleries = [len(s.galleries[protocol]) for s in dataset.evals]
    ranks = [evaluation.ranks[s.name][protocol][kind] for s in dataset.evals]
    ks = range(1, min(max(_CUT_OFFS, *config.eval.recall_at), *galleries) + 1)
    recalls = np.mean([list(ranking.recall_at_k(r, ks).values()) for r in ranks], axis=0)
    intervals = np.asarray([ranking.recall_interval(ranks, k, draws=_DRAWS) for k in ks])
    names = " = ".join(same[protocol]) if kind == "composed" else protocol
    label = f"{kind.replace('_', ' ')}, {names} (gallery {sum(galleries)})"
    found.append(curves.RecallCurve(label, recalls, intervals))
  return found


def _curves(config, workdir, dataset: Dataset, evaluation: Evaluation) -> _Section:
  results, folder = evaluation.results, workdir / "pictures"
  path = folder / "recall_curve.png"
  curves.recall_curves(
    recall_curves(config, evaluation, dataset),
    config.eval.recall_at,
    path,
    title=f"{tables.describe(results)}\n{_sentence(evaluate.describe_selection(results))}",
  )
  figures = [page.Figure("Recall at every cut-off", path, "dots at the reported ones")]
  recorded = history.read(workdir)
  if recorded.metrics("train/"):
    path = folder / "loss_curves.png"
    curves.training_curves(
      recorded, path, title=f"{config.name}, {results['dataset']}: course of the training"
    )
    note = "losses of the batches that were logged; recalls on the evaluation queries"
    figures.append(page.Figure("Course of the training", path, note))
  return _Section("Curves", tuple(figures))


def _grids(config, folder, split: EvalSplit, evaluation: Evaluation) -> list[page.Figure]:
  protocol = evaluation.results["breakdown_protocol"]
  ranks = evaluation.ranks[split.name][protocol]["composed"]
  n_found = int((ranks < cases.TOP).sum())
  kinds = (
    ("", "All queries", cases.spread(np.arange(len(ranks)), _ROWS),
     f"evenly spread over all {len(ranks)} queries"),
    ("_found", "Found", cases.found(ranks, _ROWS),
     f"evenly spread over the {n_found} queries with the target in the top {cases.TOP}"),
    ("_missed", "Missed", cases.missed(ranks, _ROWS),
     f"of the {len(ranks) - n_found} queries with the target outside the top {cases.TOP}, from "
     "the nearest miss to the farthest"),
  )  # fmt: skip
  figures = []
  for suffix, name, chosen, how in kinds:
    if not len(chosen):
      continue
    path = folder / f"retrieval_{split.name}{suffix}.png"
    encoded = evaluation.encoded[split.name]
    rows = cases.grid_rows(chosen, ranks, encoded, split, protocol, config)
    heading = f"{title(split, protocol, evaluation.results)}. Rows: {how}"
    grid.retrieval_grid(rows, path, title=heading)
    figures.append(page.Figure(name, path, how))
  return figures


def _attention(encoder, variables, vocabulary, folder, split, evaluation) -> page.Figure:
  protocol = evaluation.results["breakdown_protocol"]
  ranks = evaluation.ranks[split.name][protocol]["composed"]
  chosen = np.concatenate([cases.found(ranks, _ATTENDED), cases.missed(ranks, _ATTENDED)])
  maps = encoder.attention(variables, split, chosen, vocabulary)
  rows = cases.attention_rows(chosen, maps, ranks, split, protocol, vocabulary, encoder.config)
  path = folder / f"attention_{split.name}.png"
  heading = f"Attention. {title(split, protocol, evaluation.results)}"
  attention.attention_maps(rows, path, title=heading)
  note = "found queries, then missed ones"
  return page.Figure("Attention", path, note)


def _sentence(text: str) -> str:
  return text[:1].upper() + text[1:] + "."
