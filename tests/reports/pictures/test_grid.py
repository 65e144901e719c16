"""The retrieval grid: what is drawn where, and what becomes of odd input."""

import os

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageFont

from crn_jax.reports.pictures import canvas, grid, palette

GREY, BLUE, VERMILLION, RULE, UNREADABLE = (
  ImageColor.getrgb(c)
  for c in (palette.EMPTY, palette.BLUE, palette.VERMILLION, palette.RULE, palette.UNREADABLE)
)
RED = (200, 30, 40)


@pytest.fixture
def image(tmp_path):
  """image(name, size, colour) writes a plain PNG and returns its path."""

  def write(name="plain.png", size=(64, 64), colour=RED):
    path = tmp_path / name
    Image.new("RGB", size, colour).save(path)
    return path

  return write


def grid_row(path, **changes):
  values = {
    "reference": path,
    "text": "is blue",
    "top": tuple((path, 0.9 - 0.1 * i) for i in range(3)),
    "target": path,
    "target_position": 1,
    "rank": 1,
  }
  return grid.GridRow(**(values | changes))


def draw(rows, folder, title="demo") -> np.ndarray:
  path = folder / "grid.png"
  grid.retrieval_grid(rows, path, title=title)
  with Image.open(path) as picture:
    assert picture.format == "PNG"
    return np.asarray(picture)


def where(picture, colour):
  """(left, top, right, bottom) of the pixels of a colour, or None."""
  ys, xs = np.nonzero((picture == colour).all(axis=-1))
  return (xs.min(), ys.min(), xs.max(), ys.max()) if len(xs) else None


class TestFrames:
  def test_other_right_images_have_a_dashed_frame_in_their_places(self, image, tmp_path):
    row = grid_row(image(), target_position=0, also_right=(2,))
    columns = grid._columns([row])
    plain = draw([grid_row(image(), target_position=0)], tmp_path)
    picture = draw([row], tmp_path)
    changed = np.flatnonzero((plain != picture).any(axis=(0, 2)))
    low = columns.top[2] - grid._FRAME
    assert low <= changed.min() and changed.max() < low + grid.CELL + 2 * grid._FRAME
    frame = (picture[:, low] == BLUE).all(axis=-1)
    assert 0.3 * grid.CELL < frame.sum() < 0.9 * grid.CELL  # Dashes, then the label.

  def test_a_retrieved_target_is_framed_in_its_place(self, image, tmp_path):
    row = grid_row(image())
    picture = draw([row], tmp_path)
    columns = grid._columns([row])
    left, top, right, bottom = where(picture, BLUE)
    assert (left, right) == (columns.top[1] - 5, columns.top[1] + grid.CELL + 4)
    assert bottom - top > grid.CELL
    assert where(picture, VERMILLION) is None

  def test_a_missed_target_stands_at_the_far_right(self, image, tmp_path):
    row = grid_row(image(), target_position=None, rank=36)
    picture = draw([row], tmp_path)
    columns = grid._columns([row])
    left, _, right, _ = where(picture, VERMILLION)
    assert left == columns.missed - 5 > columns.top[-1] + grid.CELL
    assert right < picture.shape[1]
    assert where(picture, BLUE) is None

  def test_without_a_known_target_nothing_is_framed(self, image, tmp_path):
    row = grid_row(image(), target=None, target_position=None, rank=None)
    picture = draw([row], tmp_path)
    assert where(picture, BLUE) is None is where(picture, VERMILLION)
    assert grid._columns([row]).missed is None
    # A row beside it keeps its own.
    both = draw([row, grid_row(image(), target_position=None)], tmp_path)
    assert where(both, VERMILLION) is not None

  def test_without_a_reference_its_cell_is_empty(self, image, tmp_path):
    row = grid_row(image(), reference=None)
    left = grid._columns([row]).reference
    found = draw([row], tmp_path)[:, left : left + grid.CELL]
    assert not (found == RED).all(axis=-1).any()

  def test_the_frame_covers_nothing_of_the_image(self, image, tmp_path):
    path = image()
    for position in (1, None):
      picture = draw([grid_row(path, target_position=position)], tmp_path)
      n_cells = 4 if position is not None else 5
      assert (picture == RED).all(axis=-1).sum() == n_cells * grid.CELL**2

  def test_frames_stay_off_the_rules(self, image, tmp_path):
    row = grid_row(image())
    picture = draw([row, row], tmp_path)
    ruled = np.flatnonzero((picture == RULE).all(axis=-1).sum(axis=1) > 100)
    assert len(ruled) == 2
    assert not (picture[ruled] == BLUE).all(axis=-1).any()

  @pytest.mark.parametrize(("rank", "label"), [(36, "target: rank 37"), (None, "not ranked")])
  def test_the_label_counts_from_one(self, image, tmp_path, monkeypatch, rank, label):
    labels = []
    monkeypatch.setattr(grid, "_draw_label", lambda *args: labels.append(args[3]))
    draw([grid_row(image(), target_position=None, rank=rank)], tmp_path)
    assert labels == [label]


class TestCells:
  @pytest.mark.parametrize("size", [(64, 64), (300, 300), (8, 8)])
  def test_squares_fill_the_cell_at_any_size(self, image, size):
    cell = np.asarray(canvas.cell(image(size=size), grid.CELL, ImageFont.load_default(size=12)))
    assert cell.shape == (grid.CELL, grid.CELL, 3)
    assert (cell == RED).all()

  def test_pixels_are_drawn_like_their_file(self, image):
    path = image(size=(90, 40))
    font = canvas.font(12)
    assert canvas.cell(np.asarray(Image.open(path)), 50, font) == canvas.cell(path, 50, font)

  def test_the_aspect_ratio_is_kept(self, image):
    cell = np.asarray(
      canvas.cell(image(size=(100, 200)), grid.CELL, ImageFont.load_default(size=12))
    )
    side = grid.CELL // 4
    assert (cell[:, side:-side] == RED).all()
    assert (cell[:, :side] == GREY).all()
    assert (cell[:, -side:] == GREY).all()

  def test_extreme_shapes_and_grey_pictures_are_drawn(self, image, tmp_path):
    Image.new("L", (20, 20), 77).save(tmp_path / "grey.png")
    font = ImageFont.load_default(size=12)
    assert (np.asarray(canvas.cell(image(size=(99, 1)), grid.CELL, font)) == RED).any()
    assert (np.asarray(canvas.cell(tmp_path / "grey.png", grid.CELL, font)) == 77).all()

  def test_unreadable_files_become_grey_cells(self, image, tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    (tmp_path / "cut.png").write_bytes(image().read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    for name in ("cut.jpg", "cut.png", "text.jpg", "empty.jpg", "missing.jpg", "."):
      picture = draw([grid_row(image(), target=tmp_path / name, target_position=None)], tmp_path)
      left, top, right, bottom = where(picture, UNREADABLE)
      assert (right - left, bottom - top) == (grid.CELL - 1, grid.CELL - 1), name


class TestText:
  FONT = ImageFont.load_default(size=14)

  def wrap(self, text, max_lines=12):
    lines = canvas.wrap(text, self.FONT, grid._TEXT_WIDTH, max_lines)
    assert all(self.FONT.getlength(line) <= grid._TEXT_WIDTH for line in lines)
    return lines

  def test_short_text_stays_on_one_line(self):
    assert self.wrap("is blue") == ["is blue"]

  def test_wrapping_keeps_every_word(self):
    text = "has longer sleeves and is blue with white stripes instead of plain red"
    assert len(self.wrap(text)) > 1
    assert " ".join(self.wrap(text)) == text

  def test_words_wider_than_a_line_are_broken(self):
    assert "".join(self.wrap("x" * 100)) == "x" * 100

  def test_too_long_a_text_is_cut_visibly(self):
    lines = self.wrap("is blue and " * 100, max_lines=3)
    assert len(lines) == 3
    assert lines[-1].endswith("...")

  def test_line_breaks_are_kept_and_nothing_is_no_line(self):
    assert self.wrap("is blue\nhas stripes") == ["is blue", "has stripes"]
    assert self.wrap("") == []

  def test_what_utf8_cannot_hold_is_a_question_mark(self):
    assert self.wrap(os.fsdecode(b"r\xffn")) == ["r?n"]

  def test_long_texts_make_their_row_taller_and_do_not_reach_the_images(self, image, tmp_path):
    short = draw([grid_row(image())], tmp_path)
    row = grid_row(image(), text="has longer sleeves and is " * 20, target_position=None)
    long = draw([row], tmp_path)
    assert long.shape[0] > short.shape[0]
    columns = grid._columns([row])
    gap = long[:, columns.text + grid._TEXT_WIDTH + 1 : columns.top[0]]
    below_header = np.flatnonzero((long == RULE).all(axis=-1).sum(axis=1) > 100)[0] + 1
    assert (gap[below_header:] == 255).all()

  def test_a_long_title_wraps_inside_the_picture(self, image, tmp_path):
    one = draw([grid_row(image())], tmp_path)
    two = draw([grid_row(image())], tmp_path, title="demo dress, gallery of 600 images, " * 3)
    assert two.shape[0] > one.shape[0]
    assert two.shape[1] == one.shape[1]
    assert (two[:, -10:] == 255).all()


class TestFile:
  def test_folders_are_created_and_nothing_else_is_left(self, image, tmp_path):
    path = tmp_path / "run" / "pictures" / "grid.png"
    grid.retrieval_grid([grid_row(image())], str(path), title="demo")
    assert os.listdir(path.parent) == ["grid.png"]

  def test_rows_may_differ_in_length(self, image, tmp_path):
    short = grid_row(image(), top=(), target_position=None, rank=None)
    picture = draw([grid_row(image()), short], tmp_path)
    assert picture.shape[1] == grid._columns([grid_row(image()), short]).width

  def test_no_rows_is_an_error(self, tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
      grid.retrieval_grid([], tmp_path / "grid.png", title="demo")

  def test_a_position_outside_the_top_is_an_error(self):
    with pytest.raises(ValueError, match="top 3, got 3"):
      grid_row("plain.png", target_position=3)
