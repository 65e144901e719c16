"""Finished runs side by side: a table, compare.png and compare.html."""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

from crn_jax.errors import UserError
from crn_jax.reports import page, published, tables
from crn_jax.reports.pictures import curves
from crn_jax.reports.results import QUERY_KINDS, Recalls, Results
from crn_jax.retrieval import metrics
from crn_jax.workdir import history
from crn_jax.workdir.run import flat

# Fields that say where a run is, not what it is.
_PLACES = ("name", "data.root")


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run.

  Attributes:
    name: as short as it stays different from the other runs' names.
    results: what eval.json holds.
    config: field -> value, e.g. {"data.category": "dress"}.
    recorded: metrics.jsonl; empty if there is none.
  """

  name: str
  results: Results
  config: dict
  recorded: history.History


def compare(workdirs: Sequence[str | os.PathLike], out: str | os.PathLike) -> str:
  """Compares runs and writes compare.png and compare.html.

  Args:
    workdirs: folders of two or more runs.
    out: folder of the two files.

  Returns:
    Warnings, tables and the paths written, for people to read.

  Raises:
    UserError: a folder holds no finished run, fewer than two runs, one named twice, or a damaged
      file.
  """
  folders = [pathlib.Path(w) for w in workdirs]
  if len({f.resolve() for f in folders}) != len(folders) or len(folders) < 2:
    raise UserError(
      f"--workdirs: expected two or more different folders, e.g. runs/a,runs/b; got "
      f"{', '.join(map(str, folders)) or 'none'}"
    )
  runs = [load(f, name) for f, name in zip(folders, _names(folders), strict=True)]
  out = pathlib.Path(out)
  picture, html = out / "compare.png", out / "compare.html"
  draw(runs, picture)
  warnings, differing = not_comparable(runs), differences(runs)
  evaluated, *others = result_tables(runs)
  results = [evaluated, *paper_tables(runs), *others]
  page.write(
    "compare.html",
    html,
    title=f"Comparison of {len(runs)} runs",
    unit=tables.unit(_metrics(runs)),
    warnings=warnings,
    tables=results,
    figure=page.Figure("Recalls", picture, "whiskers: 95 % bootstrap interval over queries"),
    differences=differing,
  )
  lines = [f"WARNING, not comparable: {w}" for w in warnings]
  lines += [tables.as_text(t) for t in (*results, differing)]
  return "\n\n".join([*lines, f"written:\n  {picture}\n  {html}"])


def load(workdir: str | os.PathLike, name: str) -> Run:
  """Reads a finished run.

  Raises:
    UserError: config.json or eval.json is missing, damaged, or of an older version.
  """
  workdir = pathlib.Path(workdir)
  config = _read(
    workdir / "config.json",
    missing=f"{workdir} holds no run; --workdirs takes folders of runs",
    damaged="restore it, or leave this run out",
  )
  path = workdir / "eval.json"
  mend = (
    f"evaluate its last checkpoint with --mode=eval --checkpoint=last --workdir={workdir} and the "
    "run's --config"
  )
  results = _read(
    path,
    missing=f"the run in {workdir} is not finished. Start its command again to finish it, or "
    f"{mend}",
    damaged=mend,
  )
  try:
    found = Results.from_json(results)
  except UserError as error:
    raise UserError(f"{path}: {error}; {mend}") from error
  return Run(name, found, flat(config), history.read(workdir))


def not_comparable(runs: Sequence[Run]) -> list[str]:
  """What forbids to compare the runs' numbers, in sentences; empty if nothing does."""
  common = [p for p in _protocols(runs) if all(p in r.results.summary.protocols for r in runs)]
  facts: dict[str, Callable[[Results], object]] = {
    "the data sets": lambda r: r.dataset,
    "the numbers of queries": lambda r: r.summary.n_queries,
    "the captions": lambda r: r.captions,
    "the uses of the reference image": lambda r: r.describe_reference(common),
    "the protocol of the breakdown by query": lambda r: r.breakdown_protocol,
    "the skipped data": lambda r: (
      ", ".join(f"{k} {v}" for k, v in flat(r.skipped).items()) or "none"
    ),
  }
  for protocol in _protocols(runs):
    facts[f"the galleries of {protocol}"] = lambda r, p=protocol: (
      r.summary.protocols[p].counts["gallery"] if p in r.summary.protocols else "not measured"
    )
  warnings = []

  def warn(what, values):
    named = ", ".join(f"{v} in {run.name}" for v, run in zip(values, runs, strict=True))
    warnings.append(f"{what} differ: {named}")

  for what, fact in facts.items():
    values = [fact(run.results) for run in runs]
    if len(set(values)) > 1:
      warn(what, values)
  choices = [_choices(run.results) for run in runs]
  if not set.intersection(*map(set, choices)):
    warn("the choices of the checkpoint", [" and ".join(c) for c in choices])
  for run in runs:
    epochs, wanted = run.recorded.series("epoch")[1], run.config.get("num_epochs")
    if len(epochs) and wanted and round(epochs[-1], 2) < wanted:
      warnings.append(f"{run.name} is not finished: epoch {epochs[-1]:.2f} of {wanted}")
  return warnings


def result_tables(runs: Sequence[Run]) -> list[tables.Table]:
  """Tables with one column a run: what was evaluated, recalls by protocol and by query."""
  results = [run.results for run in runs]
  header = ("", *(run.name for run in runs))

  def table(title, rows, note=""):
    return tables.Table(title, header, tuple(rows), note)

  def row(name, parts, metric):
    return name, tuple(tables.recall_cells(part, [metric])[0] for part in parts)

  def gallery(recalls: Recalls | None):
    return tables.Cell("-" if recalls is None else str(recalls.counts["gallery"]))

  evaluated = {
    "data set": lambda r: r.dataset,
    "queries": lambda r: r.summary.n_queries,
    "captions": lambda r: r.captions,
    "reference image": lambda r: r.describe_reference(),
    "checkpoint step": lambda r: r.checkpoint_step,
    "selection": lambda r: " and ".join(filter(None, (r.selection, r.also))),
    "best by": lambda r: r.best_metric,
  }
  shown = [
    table(
      "Evaluated",
      [(n, tuple(tables.Cell(str(fact(r))) for r in results)) for n, fact in evaluated.items()],
      "Best checkpoints were chosen on these very queries, which flatters them.",
    )
  ]
  measured = _metrics(runs)
  for protocol in _protocols(runs):
    parts = [r.summary.protocols.get(protocol) for r in results]
    rows = [("gallery", tuple(map(gallery, parts)))]
    rows += [row(m, parts, m) for m in measured]
    # The other checkpoint stands beside the evaluated one, so that neither is shown alone.
    beside = [next(iter(r.beside), None) for r in results]
    if any(beside):
      steps = tuple(
        tables.Cell(f"{b.selection}, step {b.checkpoint_step}" if b else "-") for b in beside
      )
      rows.append(("beside it", steps))
      others = [b.summary.protocols.get(protocol) if b else None for b in beside]
      rows += [row(f"  {m}", others, m) for m in measured]
    shown.append(table(protocol, rows))
  for kind in QUERY_KINDS[1:]:
    parts = [r.summary.by_query.get(kind) for r in results]
    title = f"{kind.replace('_', ' ')} queries, {results[0].breakdown_protocol}"
    shown.append(table(title.capitalize(), [row(m, parts, m) for m in measured]))
  return shown


def paper_tables(runs: Sequence[Run]) -> list[tables.Table]:
  """As papers print it: a row a run, then the published rows of the same methods.

  A table for each data set, in the protocol of the breakdown and in those of the published rows.
  """
  shown = []
  for dataset in dict.fromkeys(run.config["data.dataset"] for run in runs):
    own = [run for run in runs if run.config["data.dataset"] == dataset]
    rows = published.rows_of(dataset, [run.config["preset"] for run in own if _is_preset(run)])
    protocols = [run.results.breakdown_protocol for run in own] + [row.protocol for row in rows]
    for protocol in dict.fromkeys(protocols):
      measured = [(run.name, _measured(run, protocol)) for run in own]
      parts = {part: None for _, values in measured for part in values}
      known = [
        row for row in rows if row.protocol == protocol and parts.keys() & row.percent.keys()
      ]
      if known or protocol in protocols[: len(own)]:
        shown.append(_paper_table(f"{dataset}, {protocol}", measured, known, list(parts)))
  return shown


def _paper_table(where: str, measured, known: Sequence[published.Published], parts) -> tables.Table:
  """Columns are what was published; if nothing was, what was measured."""
  lines = [(f"published: {row.preset}, {row.backbone}", row.percent) for row in known]
  of = [values for _, values in (lines or measured)]
  columns = [
    (part, metric)
    for part in parts
    for metric in sorted({m for v in of for m in v.get(part, ())}, key=metrics.order)
  ]
  rows = [
    (name, tuple(tables.Cell(_percent(values, *column)) for column in columns))
    for name, values in measured + lines
  ]
  header = ("", *(" ".join(column).strip() for column in columns))
  note = "Published: sources in docs/results.md; best epoch on these queries, as papers choose."
  return tables.Table(f"A row a run: {where}", header, tuple(rows), note if known else "")


def _is_preset(run: Run) -> bool:
  """Whether the composition is the preset's, not one that was put in its place."""
  composition = run.config.get("model.composition")
  return composition is None or f"{run.config['preset']}_".startswith(f"{composition}_")


def _measured(run: Run, protocol: str) -> dict[str, Mapping[str, float]]:
  """Category, "mean", or "" if the data set has none -> metric -> percent."""
  results = run.results
  if results.categories:
    parts = results.categories | {published.MEAN: results.summary}
  else:
    parts = {results.dataset.partition("/")[2]: results.summary}
  return {k: v.protocols[protocol].percent for k, v in parts.items() if protocol in v.protocols}


def _percent(values: Mapping[str, Mapping[str, float]], part: str, metric: str) -> str:
  value = values.get(part, {}).get(metric)
  return "-" if value is None else f"{value:.2f}"


def differences(runs: Sequence[Run]) -> tables.Table:
  """The fields of the configurations in which the runs differ."""
  fields = dict.fromkeys(field for run in runs for field in run.config if field not in _PLACES)
  rows = []
  for field in fields:
    values = [json.dumps(run.config[field]) if field in run.config else "-" for run in runs]
    if len(set(values)) > 1:
      rows.append((field, tuple(tables.Cell(v) for v in values)))
  note = "" if rows else "None: the runs have the same configuration."
  header = ("field", *(run.name for run in runs))
  return tables.Table("Fields in which the configurations differ", header, tuple(rows), note)


def draw(runs: Sequence[Run], path: str | os.PathLike) -> None:
  """Writes compare.png: the recall that chooses checkpoints over the steps, recalls as bars."""
  metric = runs[0].results.best_metric
  bars = {}
  for protocol in _protocols(runs):
    parts = {run.name: run.results.summary.protocols.get(protocol) for run in runs}
    for name in _metrics(runs):
      bars[f"{protocol}/{name}"] = {
        run: curves.Bar(part.percent[name], part.intervals[name])
        if part and name in part.percent
        else None
        for run, part in parts.items()
      }
  datasets = ", ".join(dict.fromkeys(run.results.dataset for run in runs))
  title = f"{datasets}: {len(runs)} runs"
  if not_comparable(runs):
    title += "; NOT COMPARABLE in all respects, see the warnings"
  curves.comparison(
    {run.name: run.recorded.series(f"eval/{metric}") for run in runs},
    bars,
    path,
    metric=metric,
    title=title,
  )


def _choices(results: Results) -> list[str]:
  """All that the evaluated checkpoint is: the last one, the best one, or both."""
  words = {"last": "last", "best": f"best by {results.best_metric}", "untrained": "untrained"}
  return [words[name] for name in (results.selection, results.also) if name]


def _protocols(runs: Sequence[Run]) -> list[str]:
  """Names of all protocols of the runs."""
  return list(dict.fromkeys(p for run in runs for p in run.results.summary.protocols))


def _read(path: pathlib.Path, *, missing: str, damaged: str) -> dict:
  """Content of a JSON file; `missing` and `damaged` say what then is and how to go on."""
  try:
    content = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f"{path}: not found, so {missing}") from None
  except ValueError as error:
    raise UserError(f"{path}: not valid JSON ({error}); {damaged}") from error
  if not isinstance(content, dict):
    raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}; {damaged}")
  return content


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
  """Last parts of the paths of different folders, as many as tell them apart."""
  parts = [f.resolve().parts for f in folders]
  tries = (["/".join(p[-n:]) for p in parts] for n in itertools.count(1))
  return next(names for names in tries if len(set(names)) == len(names))


def _metrics(runs: Sequence[Run]) -> list[str]:
  """Names of all metrics of the runs, in the order in which they are shown."""
  names = {m for run in runs for p in run.results.summary.protocols.values() for m in p.percent}
  return sorted(names, key=metrics.order)
