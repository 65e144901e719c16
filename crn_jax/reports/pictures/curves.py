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

from crn_jax.workdir import files
from crn_jax.workdir.history import History

# Okabe and Ito's palette, without its yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_STYLES = ("-", "--", ":", "-.")
_BRANCH_COLOURS = {"local": COLOURS[0], "global": COLOURS[1]}
_OTHER_COLOURS = COLOURS[2:6]
_INK, _FAINT, _RULE = "#1c1c1e", "#69696e", "#d8d8dc"
_DPI = 120
_PAD = 0.1  # Around every panel, in inches.
_COLUMNS = 4
_TERMS = {  # In the order of the panels.
  "total": "total loss",
  "classification": "classification",
  "cross_branch": "cross-branch",
  "mutual_kl": "mutual KL",
  "perceptual": "perceptual (local only)",
  "modification": "modification",
  "auxiliary": "auxiliary",
}


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
    style = {"color": COLOURS[i % len(COLOURS)], "linestyle": _STYLES[i // len(COLOURS)]}
    ks = np.arange(1, len(curve.recalls) + 1)
    axes.fill_between(ks, *curve.intervals.T, color=style["color"], alpha=0.18, linewidth=0)
    axes.plot(ks, curve.recalls, label=curve.label, linewidth=1.8, **style)
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
  """Writes a PNG of small panels over the steps: losses, rates, gradient norms, recalls.

  Panels of which nothing was recorded are left out, and so are recalls that were measured once:
  they are results, not a course. Values that are not finite are gaps.

  Args:
    history: of the run.
    path: the PNG file. Its folder is created; the file appears complete or not at all.
    title: what the picture shows.

  Raises:
    ValueError: there is nothing to draw.
  """
  panels = [_Panel(label, _of_branches(history, term)) for term, label in _TERMS.items()]
  panels += [
    _Panel("learning rate", {"both": history.series("train/learning_rate")}),
    _Panel("logit scale (1 / temperature)", _of_branches(history, "logit_scale")),
    _Panel("gradient norm", _of_branches(history, "grad_norm"), logarithmic=True),
  ]
  recalls = {m.removeprefix("eval/"): history.series(m) for m in history.metrics("eval/")}
  recalls = {name: line for name, line in recalls.items() if len(line[0]) > 1}
  for protocol in dict.fromkeys(name.partition("/")[0] for name in recalls):
    own = {n.partition("/")[2]: s for n, s in recalls.items() if n.startswith(protocol + "/R@")}
    panels.append(_Panel(f"recall, {protocol}", own, recall=True))
  panels = [p for p in panels if any(np.isfinite(values).any() for _, values in p.lines.values())]
  if not panels:
    raise ValueError("a picture of a training needs a loss, or a recall that was measured twice")

  columns = min(_COLUMNS, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = Figure(figsize=(3.3 * columns, 2.5 * rows + 0.6), layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
  for i, (axes, panel) in enumerate(zip(grid, panels, strict=False)):
    _draw_lines(axes, panel.lines)
    label = panel.label
    # A logarithm needs values above 0; comparisons with NaN, which is a gap, are false.
    if panel.logarithmic and not any((v <= 0).any() for _, v in panel.lines.values()):
      label += " (logarithmic)"
      axes.set_yscale("log")
      axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
      axes.yaxis.set_minor_locator(ticker.NullLocator())
    if panel.recall:
      axes.set_ylim(0, 100)
    axes.set_title(label, fontsize=10, color=_INK, loc="left")
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    # Only the lowest panel of a column is labelled.
    lowest = i + columns >= len(panels)
    _dress(axes, "step" if lowest else "", "%" if panel.recall else "")
    axes.tick_params(labelbottom=lowest)
    if panel.recall or i == 0:
      _legend(axes, loc="best")
  for axes in grid[len(panels) :]:
    axes.set_visible(False)
  _write(figure, path, title)


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
  colours = {run: COLOURS[i % len(COLOURS)] for i, run in enumerate(courses)}
  styles = {run: _STYLES[i // len(COLOURS) % len(_STYLES)] for i, run in enumerate(courses)}
  drawn = {run: c for run, c in courses.items() if np.isfinite(c[1]).any()}
  width = max(9.0, 3.0 + 0.9 * len(bars) + 0.28 * len(bars) * len(courses))
  figure = Figure(figsize=(width, 9 if drawn else 5), layout="constrained")
  if drawn:
    upper, lower = figure.subplots(2, 1)
    for run, (steps, values) in drawn.items():
      upper.plot(
        steps, values, color=colours[run], linestyle=styles[run], marker="o", ms=4, label=run
      )
    upper.set_title(f"{metric} over the training", fontsize=11, color=_INK, loc="left")
    upper.set_ylim(0, max(5.0, 1.15 * max(np.nanmax(v) for _, v in drawn.values())))
    _dress(upper, "step", "%")
    _legend(upper, loc="lower right")
  else:
    lower = figure.subplots()
  share = 0.8 / len(courses)
  for i, (run, colour) in enumerate(colours.items()):
    lower.bar(0, 0, color=colour, label=run)  # For the legend: the first bar may be missing.
    for j, by_run in enumerate(bars.values()):
      bar = by_run[run]
      if bar is None:
        continue
      x = j - 0.4 + (i + 0.5) * share
      below, above = bar.recall - bar.interval[0], bar.interval[1] - bar.recall
      lower.bar(x, bar.recall, 0.9 * share, color=colour)
      spread = [[max(below, 0)], [max(above, 0)]]
      lower.errorbar(x, bar.recall, spread, color=_INK, capsize=3, linewidth=1)
      lower.annotate(
        f"{bar.recall:.1f}", (x, bar.interval[1]), (0, 3), textcoords="offset points",
        ha="center", va="bottom", fontsize=8, color=_INK,
      )  # fmt: skip
  lower.set_xticks(range(len(bars)), [m.replace("/", "\n") for m in bars])
  lower.set_ylim(0, 105)
  lower.set_yticks(range(0, 101, 20))
  lower.set_title("evaluated checkpoint, 95 % interval", fontsize=11, color=_INK, loc="left")
  _dress(lower, "", "%")
  lower.grid(axis="x", visible=False)
  _legend(lower, loc="upper left")
  _write(figure, path, title)


@dataclasses.dataclass(frozen=True)
class _Panel:
  """A panel of `training_curves`.

  Attributes:
    label: its title.
    lines: name -> (steps, values).
    logarithmic: whether the values are, if they allow it.
    recall: whether the values are recalls in percent.
  """

  label: str
  lines: dict[str, tuple[np.ndarray, np.ndarray]]
  logarithmic: bool = False
  recall: bool = False


def _of_branches(history: History, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  lines = {b: history.series(f"train/{b}/{name}") for b in _BRANCH_COLOURS}
  return {b: line for b, line in lines.items() if len(line[0])}


def _draw_lines(axes: Axes, lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
  for i, (name, (steps, values)) in enumerate(lines.items()):
    # Recalls get colours that are none of a branch.
    colour = _BRANCH_COLOURS.get(name, _INK if name == "both" else _OTHER_COLOURS[i % 4])
    style = "--" if name == "global" else "-"
    # Dots where a line would be too short to see.
    marker = "o" if len(steps) < 20 else None
    axes.plot(steps, values, style, color=colour, label=name, marker=marker, ms=3, linewidth=1.3)


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
  axes.set_xlabel(x_label, fontsize=9, color=_FAINT)
  axes.set_ylabel(y_label, fontsize=9, color=_FAINT)
  axes.tick_params(labelsize=8.5, colors=_FAINT, length=3)
  axes.grid(color=_RULE, linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(_RULE)


def _legend(axes: Axes, loc: str) -> None:
  axes.legend(loc=loc, fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none")


def _write(figure: Figure, path: str | os.PathLike, title: str) -> None:
  figure.suptitle(title, fontsize=10.5, color=_INK, x=0.01, ha="left", wrap=True)
  figure.get_layout_engine().set(w_pad=_PAD, h_pad=_PAD / 2)
  with files.replacing(path) as temporary:
    figure.savefig(temporary, format="png", dpi=_DPI, facecolor="white")
