"""Curves: one point, many, and none; what of a history is drawn."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from crn_jax.reports.pictures import curves
from crn_jax.reports.pictures.curves import Bar, RecallCurve
from crn_jax.workdir.history import History

NAN = float("nan")


@pytest.fixture
def figures(monkeypatch):
  """Every figure that is drawn, to be asked what is in it."""
  made = []

  class Recording(Figure):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      made.append(self)

  monkeypatch.setattr(curves, "Figure", Recording)
  return made


def is_png(path):
  with Image.open(path) as picture:
    return picture.format == "PNG" and np.asarray(picture.convert("L")).min() < 100


def inside(figure):
  """Whether everything drawn lies inside the picture, with a visible margin (inches)."""
  figure.draw_without_rendering()
  box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
  return min(box.x0, width - box.x1) > 0.06 and min(box.y0, height - box.y1) > 0.02


def titles(figure):
  return [a.get_title(loc="left") for a in figure.axes if a.get_visible()]


def step_record(step, value):
  names = ("total", "classification", "logit_scale", "grad_norm")
  both = {f"train/{b}/{n}": value for b in ("local", "global") for n in names}
  return {"step": step, **both, "train/local/perceptual": value, "train/learning_rate": 1e-3}


def recall_record(step, value):
  return {"step": step, "eval/val_split/R@1": value, "eval/original_split/R@1": value}


class TestTraining:
  def draw(self, records, folder):
    path = folder / "pictures" / "loss_curves.png"
    curves.training_curves(History(tuple(records)), path, title="a run")
    assert is_png(path)

  def test_many_points(self, figures, tmp_path):
    self.draw([step_record(i, 5 / i) for i in range(1, 50)], tmp_path)
    (figure,) = figures
    assert titles(figure) == ["total loss", "classification", "perceptual (local only)",
                              "learning rate", "logit scale (1 / temperature)",
                              "gradient norm (logarithmic)"]  # fmt: skip
    local, global_ = figure.axes[0].get_lines()
    np.testing.assert_allclose(local.get_ydata(), 5 / np.arange(1, 50))
    assert local.get_label() == "local"
    assert (local.get_color(), local.get_linestyle()) != (
      global_.get_color(),
      global_.get_linestyle(),
    )
    assert local.get_marker() == "None"
    assert inside(figure)

  def test_one_point_is_a_dot(self, figures, tmp_path):
    self.draw([step_record(3, 2.0)], tmp_path)
    assert all(line.get_marker() == "o" for line in figures[0].axes[0].get_lines())

  def test_values_that_are_not_finite_are_gaps(self, figures, tmp_path):
    self.draw([step_record(1, 2.0), step_record(2, NAN), step_record(3, 1.0)], tmp_path)
    assert "gradient norm (logarithmic)" in titles(figures[0])

  def test_panels_of_nothing_finite_are_left_out(self, figures, tmp_path):
    self.draw([step_record(1, NAN)], tmp_path)
    assert titles(figures[0]) == ["learning rate"]

  def test_a_gradient_of_zero_has_no_logarithm(self, figures, tmp_path):
    self.draw([step_record(1, 0.0), step_record(2, 1.0)], tmp_path)
    assert "gradient norm" in titles(figures[0])
    assert figures[0].axes[5].get_yscale() == "linear"

  def test_recalls_need_two_evaluations_to_be_a_course(self, figures, tmp_path):
    self.draw([step_record(1, 1.0), recall_record(1, 10.0)], tmp_path)
    self.draw([step_record(1, 1.0), recall_record(1, 10.0), recall_record(2, 20.0)], tmp_path)
    once, twice = map(titles, figures)
    assert "recall, val_split" not in once
    assert {"recall, val_split", "recall, original_split"} <= set(twice)

  @pytest.mark.parametrize("records", [[], [recall_record(1, 10.0)], [{"step": 1}]])
  def test_nothing_to_draw_is_an_error(self, records, tmp_path):
    with pytest.raises(ValueError, match="needs a loss"):
      self.draw(records, tmp_path)


class TestRecall:
  def curve(self, n, label="composed"):
    recalls = np.linspace(10, 90, n)
    return RecallCurve(label, recalls, np.stack([recalls - 5, recalls + 5], axis=1))

  def draw(self, lines, marked, folder):
    path = folder / "recall_curve.png"
    curves.recall_curves(lines, marked, path, title="a run")
    assert is_png(path)

  @pytest.mark.parametrize("n", [1, 2, 50, 700])
  def test_any_number_of_cut_offs(self, figures, tmp_path, n):
    self.draw([self.curve(n)], (1, 10, 50), tmp_path)
    line, dots = figures[0].axes[0].get_lines()
    assert len(line.get_xdata()) == n
    assert dots.get_xdata().tolist() == [k for k in (1, 10, 50) if k <= n]
    assert inside(figures[0])

  def test_curves_of_different_lengths(self, figures, tmp_path):
    self.draw([self.curve(20, "a"), self.curve(50, "b")], (10,), tmp_path)
    legend = figures[0].axes[0].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["a", "b"]

  def test_no_curve_is_an_error(self, tmp_path):
    with pytest.raises(ValueError, match="at least one curve"):
      self.draw([], (1,), tmp_path)


class TestComparison:
  def draw(self, courses, bars, folder):
    path = folder / "compare.png"
    courses = {run: tuple(map(np.asarray, course)) for run, course in courses.items()}
    curves.comparison(courses, bars, path, metric="val_split/R@10", title="runs")
    assert is_png(path)

  def test_runs_with_different_numbers_of_evaluations(self, figures, tmp_path):
    courses = {"a": ([1, 2, 3], [5.0, 6.0, NAN]), "b": ([9], [7.0]), "c": ([], [])}
    bars = {"val_split/R@10": {"a": Bar(6, (5, 7)), "b": Bar(7, (6, 8)), "c": Bar(1, (0, 2))}}
    self.draw(courses, bars, tmp_path)
    upper, lower = figures[0].axes
    assert [line.get_label() for line in upper.get_lines()] == ["a", "b"]
    assert upper.get_ylim()[1] > 7
    assert [t.get_text() for t in lower.get_legend().get_texts()] == ["a", "b", "c"]

  def test_without_any_course_only_the_bars_are_drawn(self, figures, tmp_path):
    self.draw({"a": ([], []), "b": ([1], [NAN])}, {"x/R@1": {"a": None, "b": None}}, tmp_path)
    assert len(figures[0].axes) == 1

  def test_a_bar_that_is_missing_leaves_its_run_in_the_legend(self, figures, tmp_path):
    bars = {"x/R@1": {"a": None, "b": Bar(5, (4, 6))}, "x/R@7": {"a": Bar(9, (8, 10)), "b": None}}
    self.draw({"a": ([], []), "b": ([], [])}, bars, tmp_path)
    (axes,) = figures[0].axes
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b"]
    assert sorted(p.get_height() for p in axes.patches if p.get_height()) == [5, 9]
    assert [t.get_text() for t in axes.texts] == ["9.0", "5.0"]
