"""Results as tables, for a terminal and for a page."""

import dataclasses
from collections.abc import Iterable, Sequence

from crn_jax.input_pipeline import registry
from crn_jax.input_pipeline.checks import missing
from crn_jax.reports.results import Recalls, Results
from crn_jax.retrieval import metrics


@dataclasses.dataclass(frozen=True)
class Cell:
  """A cell of a table.

  Attributes:
    text: what it says.
    detail: said smaller behind it, e.g. an interval.
  """

  text: str
  detail: str = ""

  def __str__(self) -> str:
    return f"{self.text} ({self.detail})" if self.detail else self.text


@dataclasses.dataclass(frozen=True)
class Table:
  """A table.

  Attributes:
    title: its heading.
    header: names of the columns.
    rows: name of the row and its cells, one fewer than `header`.
    note: what one must know to read it.
  """

  title: str
  header: tuple[str, ...]
  rows: tuple[tuple[str, tuple[Cell, ...]], ...]
  note: str = ""


def as_text(table: Table) -> str:
  """The table for a terminal."""
  lines = [table.header, *((name, *map(str, cells)) for name, cells in table.rows)]
  widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
  text = [table.title]
  if table.rows:
    for first, *others in lines:
      cells = "".join("  " + c.rjust(w) for c, w in zip(others, widths[1:], strict=True))
      text.append(f"  {first.ljust(widths[0])}{cells}")
  return "\n".join([*text, *([table.note] if table.note else [])])


def recall_cells(recalls: Recalls | None, measured: Sequence[str]) -> tuple[Cell, ...]:
  """Metrics in percent with their intervals; '-' where one was not measured."""
  cells = []
  for metric in measured:
    if recalls is None or metric not in recalls.percent:
      cells.append(Cell("-"))
      continue
    low, high = recalls.intervals[metric]
    cells.append(Cell(f"{recalls.percent[metric]:.2f}", f"{low:.1f}-{high:.1f}"))
  return tuple(cells)


def results_as_text(results: Results) -> str:
  """The results of an evaluation for a terminal."""
  intervals = f"{unit(results.metrics)}; behind it the 95 % bootstrap interval over queries."
  parts = [f"{describe(results)}\n{intervals}", *map(as_text, result_tables(results))]
  if lines := notes(results):
    parts.append("\n".join(lines))
  return "\n\n".join(parts)


def result_tables(results: Results) -> list[Table]:
  """The results of an evaluation as tables."""

  def table(title, first, rows, note=""):
    rows = tuple((name, recall_cells(recalls, results.metrics)) for name, recalls in rows)
    return Table(title, (first, *results.metrics), rows, note)

  summary, mean = results.summary, ""
  if results.categories:
    mean = f" (mean of {len(results.categories)})"
  rows = [(f"{p}, gallery {r.counts['gallery']}{mean}", r) for p, r in summary.protocols.items()]
  evaluated = f"Evaluated: {results.describe_selection()}"
  explained = (protocol_note(summary.protocols), metrics.explain(results.metrics))
  tables = [table(evaluated, "protocol", rows, " ".join(filter(None, explained)))]
  for other in results.beside:
    rows = [(f"{p}, gallery {r.counts['gallery']}", r) for p, r in other.summary.protocols.items()]
    tables.append(table(f"Beside it: {other.describe_selection()}", "protocol", rows))
  if results.categories:
    rows = [
      (f"{name}: {protocol}, gallery {recalls.counts['gallery']}", recalls)
      for name, category in results.categories.items()
      for protocol, recalls in category.protocols.items()
    ]
    tables.append(table("By category", "category", rows))
  tables.append(
    table(
      f"By query, {results.breakdown_protocol}",
      "query",
      [(kind.replace("_", " "), recalls) for kind, recalls in summary.by_query.items()],
      "image only: the reference's own vector; text only: the text by itself (composed with a zero "
      "image, where a method composes).",
    )
  )
  if summary.by_text_kind is not None:
    rows = [
      (f"{kind}, {recalls.counts['n_queries']} queries", recalls)
      for kind, recalls in summary.by_text_kind.items()
    ]
    tables.append(table(f"By kind of text, {results.breakdown_protocol}", "text", rows))
  return tables


def unit(measured: Iterable[str]) -> str:
  """What is shown, and in percent."""
  only_recalls = all(name.startswith("R@") for name in measured)
  return f"{'Recall' if only_recalls else 'Metrics'} in percent"


def protocol_note(protocols: Iterable[str]) -> str:
  """What the protocols of a result mean."""
  described = registry.protocols()
  known = [f"{p} ranks {described[p]}" for p in protocols if p in described]
  warning = " Recalls of different protocols are not comparable." if len(known) > 1 else ""
  return "; ".join(known) + "." + warning if known else ""


def describe(results: Results) -> str:
  """What the recalls of an evaluation mean, in one sentence."""
  return (
    f"{results.dataset}: {results.summary.n_queries} queries; captions {results.captions}; "
    f"reference image {_reference(results)}."
  )


def _reference(results: Results) -> str:
  where = {"excluded": "excluded from its ranking", "kept": "kept in its ranking"}
  usual, _, others = results.describe_reference().partition(" ")
  return f"{where[usual]} {others}".rstrip()


def notes(results: Results) -> list[str]:
  """What else belongs to the results, in sentences."""
  notes = _whole_galleries(results)
  if results.ceilings:
    ceilings = ", ".join(f"{k.replace('_', ' ')} {v:.1f}" for k, v in results.ceilings.items())
    notes.append(f"Best possible R@10 of half a query on this synthetic set: {ceilings}.")
  if results.skipped:
    notes += missing.describe_skipped(results.skipped).splitlines()
  return notes


def _whole_galleries(results: Results) -> list[str]:
  """Cut-offs at which every ranked target is a hit, as they take in all of a gallery."""
  parts = results.categories.values() or [results.summary]
  found = []
  for protocol in results.summary.protocols:
    size = min(part.protocols[protocol].counts["gallery"] for part in parts)
    recalls = [m for m in results.metrics if m.startswith("R@")]
    whole = [m for m in recalls if int(m.partition("@")[2]) >= size]
    if whole:
      found.append(
        f"{', '.join(whole)} of {protocol} say nothing: a gallery of {size} images has no more."
      )
  return found
