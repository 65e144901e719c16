"""Curves: recall at every cut-off, the course of a training, runs side by side.

Drawn with matplotlib's objects (`Figure`, Agg), so that nothing global is touched and no display is
needed.
"""

import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crn_jax.reports import texts
from crn_jax.reports.pictures import palette
from crn_jax.workdir import files
from crn_jax.workdir.history import History

_STYLES = ("-", "--", ":", "-.")
_DPI = 120
_PAD = 0.1  # Around every panel, in inches.
_COLUMNS = 4
_WIDE = 30  # Ratio of the largest value to the smallest from which on an axis is logarithmic.


@dataclasses.dataclass(frozen=True)
class RecallCurve:
  """Recall at every cut-off.

  Attributes:
    label: what was ranked.
    recalls: [k] percent, at the cut-offs 1 .. k.
    intervals: [k, 2] percent, lower and upper end of the 95 % interval.
  """

  label: str
  recalls: np.ndarray
  intervals: np.ndarray


@dataclasses.dataclass(frozen=True)
class Bar:
  """A recall of one run.

  Attributes:
    recall: percent.
    interval: lower and upper end of the 95 % interval, percent.
  """

  recall: float
  interval: tuple[float, float]


def recall_curves(
  curves: Sequence[RecallCurve], marked: Sequence[int], path: str | os.PathLike, *, title: str
) -> None:
  """Writes a PNG of recall over the cut-off K, with the intervals as bands.

  Args:
    curves: the curves, best first; of one length or of several.
    marked: cut-offs at which a dot stands on each curve: the reported ones.
    path: the PNG file. Its folder is created; the file appears complete or not at all.
    title: what the picture shows.

  Raises:
    ValueError: there are no curves.
  """
  if not curves:
    raise ValueError("a picture of recall needs at least one curve")
  figure = Figure(figsize=(9, 5.6), layout="constrained")
  axes = figure.subplots()
  for i, curve in enumerate(curves):
    style = _style(i)
    ks = np.arange(1, len(curve.recalls) + 1)
    axes.fill_between(ks, *curve.intervals.T, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(ks, curve.recalls, label=_plain(curve.label), linewidth=1.8, **style)
    dots = [k for k in marked if k <= len(ks)]
    at = curve.recalls[np.asarray(dots, int) - 1]
    axes.plot(dots, at, "o", color=style["color"], ms=4.5, clip_on=False, zorder=3)
  longest = max(len(c.recalls) for c in curves)
  axes.set_xscale("log")
  axes.set_xlim(1, max(longest, 2))
  ticks = sorted({k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, *marked) if k <= longest})
  axes.xaxis.set_major_locator(ticker.FixedLocator(ticks))
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
  axes.set_ylim(0, 100)
  _dress(axes, "cut-off K (logarithmic)", "queries with the target in the top K (%)")
  _legend(axes, loc="upper left")
  _write(figure, path, f"{title}\nBands: 95 % bootstrap intervals over queries.")


def training_curves(history: History, path: str | os.PathLike, *, title: str) -> None:
  """Writes a PNG of small panels over the steps: losses, learning rate, recalls.

  What is recorded as `train/<part>/<term>` makes a panel a term with a line a part, both in order
  of first appearance, each point the mean over a window of steps (see `windows`). Panels of which
  nothing finite was recorded are left out, and so are recalls that were measured once: they are
  results, not a course. Values that are not finite are gaps.

  Args:
    history: of the run.
    path: the PNG file. Its folder is created; the file appears complete or not at all.
    title: what the picture shows.

  Raises:
    ValueError: there is nothing to draw.
  """
  panels = [
    *_terms(history),
    _Panel("learning rate", {"": _Line(*history.series("train/learning_rate"), palette.INK)}),
    *_recalls(history),
  ]
  panels = [p for p in panels if any(np.isfinite(line.values).any() for line in p.lines.values())]
  if not panels:
    raise ValueError("a picture of a training needs a loss, or a recall that was measured twice")

  columns = min(_COLUMNS, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = Figure(figsize=(3.3 * columns, 2.5 * rows + 0.8), layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
  explained = {""}
  for i, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
    # Only the lowest panel of a column is labelled.
    _draw_panel(axes, panel, lowest=i + columns >= len(panels))
    if not explained.issuperset(panel.lines):
      _legend(axes, loc="best")
      explained.update(panel.lines)
  for axes in grid[len(panels) :]:
    axes.set_visible(False)
  note = "Losses and other terms: means over the steps since the record before."
  _write(figure, path, f"{title}\n{note}")


def windows(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Joins records of short windows with their neighbours.

  A record is the mean over the steps since the one before, and an evaluation makes a record out of
  turn: a mean over a step or two beside means over many, which looks like a jump. A window shorter
  than half the usual one is joined with the next, the last with the one before.

  Args:
    steps: [n] int, rising.
    values: [n], means over the steps since the record before.

  Returns:
    Steps [m] at the ends of the joined windows, m <= n, and means [m] over them.
  """
  lengths = np.diff(steps, prepend=0)
  ends, pending = [], 0
  for i, length in enumerate(lengths):
    pending += length
    if pending >= np.median(lengths) / 2:
      ends.append(i)
      pending = 0
  if pending:
    ends[-1] = len(steps) - 1
  starts = [0, *(end + 1 for end in ends[:-1])]
  sums = np.add.reduceat(values * lengths, starts)
  return steps[ends], sums / np.add.reduceat(lengths, starts)


def comparison(
  courses: dict[str, tuple[np.ndarray, np.ndarray]],
  bars: dict[str, dict[str, Bar | None]],
  path: str | os.PathLike,
  *,
  metric: str,
  title: str,
) -> None:
  """Writes a PNG of runs side by side: recall over the steps, and final recalls with intervals.

  Args:
    courses: run -> (steps, recalls in percent) of `metric`; empty arrays if not recorded.
    bars: metric -> run -> its recall, None where it was not measured.
    path: the PNG file. Its folder is created; the file appears complete or not at all.
    metric: that of `courses`.
    title: what the picture shows.
  """
  styles = {run: _style(i) for i, run in enumerate(courses)}
  drawn = {run: c for run, c in courses.items() if np.isfinite(c[1]).any()}
  width = max(9.0, 3.0 + 0.9 * len(bars) + 0.28 * len(bars) * len(courses))
  figure = Figure(figsize=(width, 9 if drawn else 5), layout="constrained")
  if drawn:
    upper, lower = figure.subplots(2, 1)
    for run, (steps, values) in drawn.items():
      upper.plot(steps, values, **styles[run], marker="o", ms=4, label=_plain(run))
    upper.set_title(
      _plain(f"{metric} over the training"), fontsize=11, color=palette.INK, loc="left"
    )
    upper.set_ylim(0, max(5.0, 1.15 * max(np.nanmax(v) for _, v in drawn.values())))
    _dress(upper, "step", "%")
    _legend(upper, loc="lower right")
  else:
    lower = figure.subplots()
  share = 0.8 / len(courses)
  for i, (run, style) in enumerate(styles.items()):
    lower.bar(
      0, 0, color=style["color"], label=_plain(run)
    )  # For the legend: the first bar may be missing.
    for j, by_run in enumerate(bars.values()):
      bar = by_run[run]
      if bar is None:
        continue
      x = j - 0.4 + (i + 0.5) * share
      below, above = bar.recall - bar.interval[0], bar.interval[1] - bar.recall
      lower.bar(x, bar.recall, 0.9 * share, color=style["color"])
      spread = [[max(below, 0)], [max(above, 0)]]
      lower.errorbar(x, bar.recall, spread, color=palette.INK, capsize=3, linewidth=1)
      lower.annotate(
        f"{bar.recall:.1f}", (x, bar.interval[1]), (0, 3), textcoords="offset points",
        ha="center", va="bottom", fontsize=8, color=palette.INK,
      )  # fmt: skip
  lower.set_xticks(range(len(bars)), [_plain(m.replace("/", "\n")) for m in bars])
  lower.set_ylim(0, 105)
  lower.set_yticks(range(0, 101, 20))
  lower.set_title("evaluated checkpoint, 95 % interval", fontsize=11, color=palette.INK, loc="left")
  _dress(lower, "", "%")
  lower.grid(axis="x", visible=False)
  _legend(lower, loc="upper left")
  _write(figure, path, title)


@dataclasses.dataclass(frozen=True)
class _Line:
  """A line of a panel: steps [n], values [n], its colour and style."""

  steps: np.ndarray
  values: np.ndarray
  color: str
  linestyle: str = "-"


@dataclasses.dataclass(frozen=True)
class _Panel:
  """A panel of `training_curves`.

  Attributes:
    title: what is drawn.
    lines: name -> line, of one colour in all panels; a name of "" needs no legend.
    percent: whether the values are.
    wide: whether the values, if they differ much, are drawn on a logarithmic axis.
  """

  title: str
  lines: dict[str, _Line]
  percent: bool = False
  wide: bool = False


def _terms(history: History) -> list[_Panel]:
  """A panel a term of `train/<part>/<term>`."""
  names = _names(history, "train")
  parts = dict.fromkeys(part for part, _ in names)
  panels = []
  for term in dict.fromkeys(term for _, term in names):
    lines = {}
    for i, part in enumerate(parts):
      if (part, term) in names:
        points = windows(*history.series(f"train/{part}/{term}"))
        # Lines of parts often coincide.
        lines[part] = _Line(*points, _colour(i), _STYLES[i % len(_STYLES)])
    panels.append(_Panel(term.replace("_", " "), lines, wide=True))
  return panels


def _names(history: History, kind: str) -> list[tuple[str, str]]:
  """The two last parts of the metrics `<kind>/<a>/<b>`."""
  split = [name.split("/") for name in history.metrics(f"{kind}/")]
  return [(parts[1], parts[2]) for parts in split if len(parts) == 3]


def _recalls(history: History) -> list[_Panel]:
  """A panel a protocol of `eval/<protocol>/<metric>`, of those measured more than once."""
  names = _names(history, "eval")
  metrics = list(dict.fromkeys(metric for _, metric in names))
  panels = {}
  for protocol, metric in names:
    steps, values = history.series(f"eval/{protocol}/{metric}")
    if len(steps) > 1:
      # From the third colour on: the first ones are those of parts.
      line = _Line(steps, values, **_style(2 + metrics.index(metric)))
      panels.setdefault(protocol, {})[metric] = line

  def title(protocol):
    only_recalls = all(metric.startswith("R") for metric in panels[protocol])
    return f"{'recall' if only_recalls else 'metrics'}, {protocol}"

  return [_Panel(title(p), lines, percent=True) for p, lines in panels.items()]


def _draw_panel(axes: Axes, panel: _Panel, *, lowest: bool) -> None:
  for name, line in panel.lines.items():
    # Dots where a line would be too short to see.
    marker = "o" if len(line.steps) < 20 else None
    style = {"color": line.color, "linestyle": line.linestyle, "label": _plain(name)}
    axes.plot(line.steps, line.values, marker=marker, ms=3, linewidth=1.3, **style)
  title, values = panel.title, np.concatenate([line.values for line in panel.lines.values()])
  low, high = np.nanmin(values), np.nanmax(values)
  if panel.wide and 0 < _WIDE * low <= high < math.inf:
    title += " (logarithmic)"
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
  if panel.percent:
    axes.set_ylim(0, 100)
  axes.set_title(_plain(title), fontsize=10, color=palette.INK, loc="left")
  axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
  _dress(axes, "step" if lowest else "", "%" if panel.percent else "")
  axes.tick_params(labelbottom=lowest)


def _style(i: int) -> dict[str, str]:
  """Colour of the i-th line, and its style where the colours begin again."""
  return {"color": _colour(i), "linestyle": _STYLES[i // len(palette.SERIES) % len(_STYLES)]}


def _colour(i: int) -> str:
  return palette.SERIES[i % len(palette.SERIES)]


def _plain(text: str) -> str:
  """A text as it is: dollars are no formula, and a leading "_" does not hide it in a legend."""
  text = texts.printable(text).replace("$", r"\$")
  return f" {text}" if text.startswith("_") else text


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
  axes.set_xlabel(x_label, fontsize=9, color=palette.FAINT)
  axes.set_ylabel(y_label, fontsize=9, color=palette.FAINT)
  axes.tick_params(labelsize=8.5, colors=palette.FAINT, length=3)
  axes.grid(color=palette.RULE, linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(palette.RULE)


def _legend(axes: Axes, loc: str) -> None:
  axes.legend(loc=loc, fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none")


def _write(figure: Figure, path: str | os.PathLike, title: str) -> None:
  figure.suptitle(_plain(title), fontsize=10.5, color=palette.INK, x=0.01, ha="left", wrap=True)
  figure.get_layout_engine().set(w_pad=_PAD, h_pad=_PAD / 2)
  with files.replacing(path) as temporary:
    figure.savefig(temporary, format="png", dpi=_DPI, facecolor="white")
