"""What holds for every drawing: odd texts, and files that are complete or not there."""

import os

import numpy as np
import pytest
from PIL import Image

from crn_jax.reports.pictures import attention, curves, grid
from crn_jax.workdir.history import History

# A byte of a path in another encoding; formulas of matplotlib, one of them broken; a name that a
# legend of matplotlib hides; a line break.
ODD = os.fsdecode(b"r\xffn \xe9") + " $\\x$ $a_b$ _x\nnext"


def recall_curve(path, text):
  recalls = np.array([10.0, 20.0])
  intervals = np.stack([recalls, recalls], axis=1)
  curves.recall_curves([curves.RecallCurve(text, recalls, intervals)], (1,), path, title=text)


def training(path, text):
  records = [{"step": s, f"train/{text}/{text}": 1.0, f"eval/{text}/R@1": s} for s in (1, 2)]
  curves.training_curves(History(tuple(records)), path, title=text)


def comparison(path, text):
  runs = {text: (np.arange(2), np.arange(2.0)), f"_{text}": (np.arange(2), np.arange(2.0))}
  bars = {text: {run: curves.Bar(1.0, (0.0, 2.0)) for run in runs}}
  curves.comparison(runs, bars, path, metric=text, title=text)


def retrieval(path, text):
  row = grid.GridRow(f"/{text}.png", text, ((f"/{text}.png", 0.5),), f"/{text}.png", None, 3)
  grid.retrieval_grid([row], path, title=text)


def maps(path, text):
  pictures = np.zeros((8, 8, 3), np.uint8)
  words = (attention.Word(text), attention.Word(text, text))
  row = attention.AttentionRow(
    pictures, text, text, words, {text: np.full((2, 2, 2), 0.5)}, {text: attention.WORDS},
    {text: text},
  )  # fmt: skip
  attention.attention_maps([row], path, title=text)


DRAWINGS = (recall_curve, training, comparison, retrieval, maps)


@pytest.mark.parametrize("drawing", DRAWINGS)
class TestEveryDrawing:
  def test_texts_of_any_kind_are_drawn(self, drawing, tmp_path):
    path = tmp_path / "new" / "picture.png"
    drawing(path, ODD.replace("/", ""))
    with Image.open(path) as picture:
      picture.verify()
    assert os.listdir(path.parent) == ["picture.png"]

  def test_a_failed_write_leaves_the_old_picture_and_nothing_else(
    self, drawing, tmp_path, monkeypatch
  ):
    path = tmp_path / "picture.png"
    drawing(path, "before")
    before = path.read_bytes()

    def fail(self, name, *args, **kwargs):
      with open(name, "wb") as file:
        file.write(b"half a picture")
      raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)  # matplotlib writes by Pillow, too.
    with pytest.raises(OSError, match="disk full"):
      drawing(path, "after")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["picture.png"]


def test_names_that_begin_with_an_underscore_are_in_the_legend(tmp_path, monkeypatch):
  made, write = [], curves._write
  monkeypatch.setattr(
    curves, "_write", lambda figure, *args: (made.append(figure), write(figure, *args))
  )
  comparison(tmp_path / "a.png", "run")
  for axes in made[0].axes:
    assert [t.get_text().strip() for t in axes.get_legend().get_texts()] == ["run", "_run"]
