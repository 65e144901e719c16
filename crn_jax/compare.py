"""Finished runs side by side: a table, compare.png and compare.html."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence

from crn_jax import evaluate, history, page
from crn_jax.pictures import curves

_KEYS = ("dataset", "checkpoint_step", "selection", "captions", "exclude_reference", "best_metric",
         "breakdown_protocol", "n_queries", "protocols", "by_query")  # fmt: skip
# Fields that say where a run is, not what it is.
_PLACES = ("name", "data.root")


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run.

  Attributes:
    name: as short as it stays different from the other runs' names.
    results: eval.json.
    config: field -> value, e.g. {"data.category": "dress"}.
    recorded: metrics.jsonl; empty if there is none.
  """

  name: str
  results: dict
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
    FileNotFoundError: a folder holds no finished run.
    ValueError: fewer than two runs, one named twice, or a damaged file.
  """
  folders = [pathlib.Path(w) for w in workdirs]
  if len({f.resolve() for f in folders}) != len(folders) or len(folders) < 2:
    raise ValueError(
      f"--workdirs: expected two or more different folders, e.g. runs/a,runs/b; got "
      f"{', '.join(map(str, folders)) or 'none'}"
    )
  runs = [load(f, name) for f, name in zip(folders, _names(folders), strict=True)]
  out = pathlib.Path(out)
  picture, html = out / "compare.png", out / "compare.html"
  draw(runs, picture)
  warnings, tables, differing = not_comparable(runs), result_tables(runs), differences(runs)
  page.write(
    "compare.html",
    html,
    title=f"Comparison of {len(runs)} runs",
    warnings=warnings,
    tables=tables,
    figure=page.Figure("Recalls", picture, "whiskers: 95 % bootstrap interval over queries"),
    differences=differing,
  )
  lines = [f"WARNING, not comparable: {w}" for w in warnings]
  lines += [_as_text(t) for t in (*tables, differing)]
  return "\n\n".join([*lines, f"written:\n  {picture}\n  {html}"])


def load(workdir: str | os.PathLike, name: str) -> Run:
  """Reads a finished run.

  Raises:
    FileNotFoundError: config.json or eval.json is missing.
    ValueError: one of them is damaged, or of an older version.
  """
  workdir = pathlib.Path(workdir)
  config = _read(
    workdir / "config.json", f"{workdir} holds no run; --workdirs takes folders of runs"
  )
  path = workdir / "eval.json"
  mend = (
    f"evaluate its last checkpoint with --mode=eval --checkpoint=last --workdir={workdir} and the "
    "run's --config"
  )
  results = _read(
    path, f"the run in {workdir} is not finished. Start its command again to finish it, or {mend}"
  )
  missing = [key for key in _KEYS if key not in results]
  if not missing and any("intervals" not in p for p in results["protocols"].values()):
    missing = ["intervals"]
  if missing:
    raise ValueError(f"{path}: lacks {', '.join(missing)}, so an older version wrote it; {mend}")
  return Run(name, results, page.flat(config), history.read(workdir))


def not_comparable(runs: Sequence[Run]) -> list[str]:
  """What forbids to compare the runs' numbers, in sentences; empty if nothing does."""
  facts: dict[str, Callable[[dict], object]] = {
    "the data sets": lambda r: r["dataset"],
    "the numbers of queries": lambda r: r["n_queries"],
    "the captions": lambda r: r["captions"],
    "the reference image": lambda r: "excluded" if r["exclude_reference"] else "kept",
    "the choice of the checkpoint": lambda r: (
      f"best by {r['best_metric']}" if r["selection"] == "best" else r["selection"]
    ),
    "the protocol of the breakdown by query": lambda r: r["breakdown_protocol"],
    "the skipped data": lambda r: (
      ", ".join(f"{k} {v}" for k, v in page.flat(r.get("skipped") or {}).items()) or "none"
    ),
  }
  protocols = dict.fromkeys(p for run in runs for p in run.results["protocols"])
  for protocol in protocols:
    facts[f"the galleries of {protocol}"] = lambda r, p=protocol: (
      r["protocols"].get(p, {}).get("gallery", "not measured")
    )
  warnings = []
  for what, fact in facts.items():
    values = {run.name: fact(run.results) for run in runs}
    if len(set(values.values())) > 1:
      named = ", ".join(f"{value} in {name}" for name, value in values.items())
      warnings.append(f"{what} differ: {named}")
  for run in runs:
    epochs, wanted = run.recorded.series("epoch")[1], run.config.get("num_epochs")
    if len(epochs) and wanted and round(epochs[-1], 2) < wanted:
      warnings.append(f"{run.name} is not finished: epoch {epochs[-1]:.2f} of {wanted}")
  return warnings


def result_tables(runs: Sequence[Run]) -> list[page.Table]:
  """Tables with one column a run: what was evaluated, recalls by protocol and by query."""
  results = [run.results for run in runs]
  header = ("", *(run.name for run in runs))

  def table(title, rows, note=""):
    return page.Table(title, header, tuple(rows), note)

  def row(name, parts, metric):
    return name, tuple(page.recall_cells(part, [metric])[0] for part in parts)

  evaluated = {
    "data set": lambda r: r["dataset"],
    "queries": lambda r: r["n_queries"],
    "captions": lambda r: r["captions"],
    "reference image": lambda r: "excluded" if r["exclude_reference"] else "kept",
    "checkpoint step": lambda r: r["checkpoint_step"],
    "selection": lambda r: (
      f"best by {r['best_metric']} on these queries" if r["selection"] == "best" else "last"
    ),
  }
  tables = [
    table(
      "Evaluated",
      [(n, tuple(page.Cell(str(fact(r))) for r in results)) for n, fact in evaluated.items()],
    )
  ]
  metrics = _metrics(runs)
  for protocol in dict.fromkeys(p for r in results for p in r["protocols"]):
    parts = [r["protocols"].get(protocol, {}) for r in results]
    rows = [("gallery", tuple(page.Cell(str(p.get("gallery", "-"))) for p in parts))]
    rows += [row(m, parts, m) for m in metrics]
    # The other checkpoint stands beside the evaluated one, so that neither is shown alone.
    beside = [(r.get("beside") or [{}])[0] for r in results]
    if any(beside):
      steps = tuple(
        page.Cell(f"{b['selection']}, step {b['checkpoint_step']}" if b else "-") for b in beside
      )
      rows.append(("beside it", steps))
      others = [b.get("protocols", {}).get(protocol, {}) for b in beside]
      rows += [row(f"  {m}", others, m) for m in metrics]
    tables.append(table(protocol, rows))
  for kind in evaluate.QUERY_KINDS[1:]:
    parts = [r["by_query"].get(kind, {}) for r in results]
    title = f"{kind.replace('_', ' ')} queries, {results[0]['breakdown_protocol']}"
    tables.append(table(title.capitalize(), [row(m, parts, m) for m in metrics]))
  return tables


def differences(runs: Sequence[Run]) -> page.Table:
  """The fields of the configurations in which the runs differ."""
  fields = dict.fromkeys(field for run in runs for field in run.config if field not in _PLACES)
  rows = []
  for field in fields:
    values = [json.dumps(run.config[field]) if field in run.config else "-" for run in runs]
    if len(set(values)) > 1:
      rows.append((field, tuple(page.Cell(v) for v in values)))
  note = "" if rows else "None: the runs have the same configuration."
  header = ("field", *(run.name for run in runs))
  return page.Table("Fields in which the configurations differ", header, tuple(rows), note)


def draw(runs: Sequence[Run], path: str | os.PathLike) -> None:
  """Writes compare.png: the recall that chooses checkpoints over the steps, recalls as bars."""
  metric = runs[0].results["best_metric"]
  bars = {}
  for protocol in dict.fromkeys(p for run in runs for p in run.results["protocols"]):
    for name in _metrics(runs):
      parts = {run.name: run.results["protocols"].get(protocol, {}) for run in runs}
      bars[f"{protocol}/{name}"] = {
        run: curves.Bar(part[name], tuple(part["intervals"][name])) if name in part else None
        for run, part in parts.items()
      }
  datasets = ", ".join(dict.fromkeys(run.results["dataset"] for run in runs))
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


def _read(path: pathlib.Path, mend: str) -> dict:
  try:
    content = json.loads(path.read_text())
  except (FileNotFoundError, NotADirectoryError):
    raise FileNotFoundError(f"{path}: not found, so {mend}") from None
  except ValueError as error:
    raise ValueError(f"{path}: not valid JSON ({error}); evaluate the run again") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path}: expected a JSON object; evaluate the run again")
  return content


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
  """Last parts of the paths, as many as tell the runs apart."""
  parts = [f.resolve().parts for f in folders]
  for count in range(1, max(map(len, parts)) + 1):
    names = ["/".join(p[-count:]) for p in parts]
    if len(set(names)) == len(names):
      return names
  raise ValueError(f"--workdirs: two of {', '.join(map(str, folders))} are the same folder")


def _metrics(runs: Sequence[Run]) -> list[str]:
  """Names of all recalls of the runs, by rising cut-off."""
  names = {
    m for run in runs for p in run.results["protocols"].values() for m in evaluate.metric_names(p)
  }
  return sorted(names, key=lambda name: int(name.partition("@")[2]))


def _as_text(table: page.Table) -> str:
  lines = [table.header, *((name, *map(str, cells)) for name, cells in table.rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
  text = [table.title]
  if table.rows:
    text += [
      "  "
      + line[0].ljust(widths[0])
      + "".join("  " + cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
      for line in lines
    ]
  return "\n".join([*text, *([table.note] if table.note else [])])
