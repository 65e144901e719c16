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
  losses = {f"train/{p}/{n}": value for p in ("coarse", "fine") for n in ("margin", "grad_norm")}
  return {"step": step, **losses, "train/fine/total_loss": value, "train/learning_rate": 1e-3}


def recall_record(step, value):
  return {"step": step, "eval/val_split/R@1": value, "eval/original_split/R@1": value}


class TestTraining:
  def draw(self, records, folder):
    path = folder / "pictures" / "loss_curves.png"
    curves.training_curves(History(tuple(records)), path, title="a run")
    assert is_png(path)

  def test_every_term_is_a_panel_and_every_part_a_line_as_recorded(self, figures, tmp_path):
    self.draw([step_record(i, 5 + 1 / i) for i in range(1, 50)], tmp_path)
    (figure,) = figures
    assert titles(figure) == ["margin", "grad norm", "total loss", "learning rate"]
    coarse, fine = figure.axes[0].get_lines()
    np.testing.assert_allclose(coarse.get_ydata(), 5 + 1 / np.arange(1, 50))
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["coarse", "fine"]
    assert coarse.get_color() != fine.get_color()
    assert coarse.get_linestyle() != fine.get_linestyle()
    assert coarse.get_marker() == "None"
    (alone,) = figure.axes[2].get_lines()
    assert (alone.get_color(), alone.get_label()) == (fine.get_color(), "fine")
    assert figure.axes[1].get_legend() is None  # The first panel has said it.
    assert inside(figure)

  def test_a_part_that_appears_later_is_explained_where_it_appears(self, figures, tmp_path):
    self.draw([{"step": 1, "train/a/x": 1.0, "train/b/y": 1.0}], tmp_path)
    legends = [a.get_legend().get_texts() for a in figures[0].axes]
    assert [[t.get_text() for t in legend] for legend in legends] == [["a"], ["b"]]

  def test_the_figure_says_over_what_losses_are_means(self, figures, tmp_path):
    self.draw([step_record(1, 2.0)], tmp_path)
    assert "means over the steps since the record before" in figures[0].get_suptitle()

  def test_a_record_at_an_evaluation_makes_no_vertical_line(self, figures, tmp_path):
    records = [step_record(s, 1.0) for s in (50, 100, 150)]
    records += [step_record(153, 9.0), step_record(200, 1.0), step_record(201, 9.0)]
    self.draw(records, tmp_path)
    line = figures[0].axes[0].get_lines()[0]
    assert line.get_xdata().tolist() == [50, 100, 150, 201]
    # Means over the 51 steps since 150, of which 3 + 1 had a loss of 9.
    np.testing.assert_allclose(line.get_ydata(), [1, 1, 1, (4 * 9 + 47) / 51])

  def test_one_point_is_a_dot(self, figures, tmp_path):
    self.draw([step_record(3, 2.0)], tmp_path)
    assert all(line.get_marker() == "o" for line in figures[0].axes[0].get_lines())

  def test_values_that_are_not_finite_are_gaps(self, figures, tmp_path):
    self.draw([step_record(1, 2.0), step_record(2, NAN), step_record(3, 1.0)], tmp_path)
    np.testing.assert_array_equal(figures[0].axes[0].get_lines()[0].get_ydata(), [2, NAN, 1])

  def test_panels_of_nothing_finite_are_left_out(self, figures, tmp_path):
    self.draw([step_record(1, NAN)], tmp_path)
    assert titles(figures[0]) == ["learning rate"]

  @pytest.mark.parametrize(
    ("values", "scale"),
    [((40.0, 1.0), "log"), ((900.0, 1.0), "log"), ((20.0, 1.0), "linear"), ((1.0, 0.0), "linear"),
     ((40.0, -1.0), "linear"), ((float("inf"), 1.0), "linear")],
  )  # fmt: skip
  def test_what_differs_much_and_is_above_zero_is_drawn_logarithmically(
    self, figures, tmp_path, values, scale
  ):
    self.draw([step_record(s, value) for s, value in enumerate(values, 1)], tmp_path)
    axes = figures[0].axes[0]
    assert axes.get_yscale() == scale
    assert ("(logarithmic)" in axes.get_title(loc="left")) == (scale == "log")

  def test_recalls_need_two_evaluations_to_be_a_course(self, figures, tmp_path):
    self.draw([step_record(1, 1.0), recall_record(1, 10.0)], tmp_path)
    self.draw([step_record(1, 1.0), recall_record(1, 10.0), recall_record(2, 20.0)], tmp_path)
    once, twice = map(titles, figures)
    assert "recall, val_split" not in once
    assert {"recall, val_split", "recall, original_split"} <= set(twice)

  def test_many_metrics_are_told_apart_by_colour_and_style(self, figures, tmp_path):
    names = ["R@1", "R@5", "R@10", "R@50", "Rsub@1", "Rsub@2", "Rsub@3", "mean"]
    records = [{"step": s, **{f"eval/cirr_val/{n}": 1.0 for n in names}} for s in (1, 2)]
    self.draw(records, tmp_path)
    (axes,) = figures[0].axes
    assert axes.get_title(loc="left") == "metrics, cirr_val"
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == len(names)

  def test_a_metric_has_one_colour_in_all_protocols(self, figures, tmp_path):
    records = [{"step": s, "eval/a/R@1": 1, "eval/a/R@5": 2, "eval/b/R@5": 3} for s in (1, 2)]
    self.draw(records, tmp_path)
    first, second = figures[0].axes
    assert first.get_lines()[1].get_color() == second.get_lines()[0].get_color()
    assert first.get_lines()[0].get_color() != first.get_lines()[1].get_color()

  @pytest.mark.parametrize("records", [[], [recall_record(1, 10.0)], [{"step": 1}]])
  def test_nothing_to_draw_is_an_error(self, records, tmp_path):
    with pytest.raises(ValueError, match="needs a loss"):
      self.draw(records, tmp_path)


class TestWindows:
  def test_windows_of_the_usual_length_stay_as_they_are(self):
    steps, values = np.arange(10, 50, 10), np.arange(4.0)
    for found, expected in zip(curves.windows(steps, values), (steps, values), strict=True):
      np.testing.assert_array_equal(found, expected)

  def test_a_short_window_is_joined_with_the_next_and_weighs_its_steps(self):
    steps, values = curves.windows(np.array([10, 20, 22, 30]), np.array([1.0, 1.0, 5.0, 2.0]))
    np.testing.assert_array_equal(steps, [10, 20, 30])
    np.testing.assert_allclose(values, [1, 1, (2 * 5 + 8 * 2) / 10])

  def test_a_short_last_window_is_joined_with_the_one_before(self):
    steps, values = curves.windows(np.array([10, 20, 21]), np.array([1.0, 2.0, 13.0]))
    np.testing.assert_array_equal(steps, [10, 21])
    np.testing.assert_allclose(values, [1, (10 * 2 + 13) / 11])

  def test_half_a_window_is_long_enough(self):
    steps, _ = curves.windows(np.array([10, 15, 25]), np.zeros(3))
    np.testing.assert_array_equal(steps, [10, 15, 25])

  def test_no_step_is_lost_whatever_the_records_are(self):
    rng = np.random.default_rng(0)
    for n in range(1, 40):
      steps = np.cumsum(rng.integers(1, 60, n))
      values = rng.random(n)
      ends, means = curves.windows(steps, values)
      assert ends[-1] == steps[-1]
      assert set(ends) <= set(steps)
      lengths = np.diff(ends, prepend=0)
      usual = np.median(np.diff(steps, prepend=0))
      assert (lengths >= usual / 2).all()
      total = (np.diff(steps, prepend=0) * values).sum()
      np.testing.assert_allclose((lengths * means).sum(), total, rtol=1e-12)


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
