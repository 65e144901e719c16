"""Results in words and tables: nothing that changes the numbers may be missing."""

import dataclasses

import pytest

from crn_jax.reports import tables
from crn_jax.reports.results import Recalls
from crn_jax.reports.tables import Cell, Table
from tests import made_up

SKIPPED = {
  "train": {"triplets": 4, "of_triplets": 9, "images_missing": 1},
  "val": {
    "dress": {
      "queries": 3, "of_queries": 23, "val_split": 1, "of_val_split": 26,
      "original_split": 1, "of_original_split": 31, "images_missing": 1,
    }
  },
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
  """Of the best checkpoint, with the last one beside it, on data with holes."""
  config = made_up.config()
  data = made_up.dataset(
    made_up.split(tmp_path), skipped=SKIPPED, ceilings={"image_only": 23.1, "text_only": 14.0}
  )
  best = made_up.evaluation(config, data, step=7, selection="best").results
  last = made_up.evaluation(config, data, step=9).results
  return dataclasses.replace(best, beside=(last,))


def test_text_has_all_that_changes_the_numbers(results):
  text = tables.results_as_text(results)
  for part in (
    "fashioniq/dress", "20 queries", "captions joined", "excluded from its ranking",
    "val_split, gallery 25", "original_split, gallery 30", "95 % bootstrap interval",
    "best checkpoint (step 7), chosen by val_split/R@10 on these queries",
    "Beside it: last checkpoint (step 9)",
    "image only", "text only", "modification, 10 queries",
    "skipped in train: 4 of 9 triplets", "skipped in val: dress 3 of 23 queries",
    "image only 23.1",
  ):  # fmt: skip
    assert part in text, part


def test_every_recall_stands_with_its_interval(results):
  text = tables.results_as_text(results)
  for part in (results, *results.beside):
    for recalls in part.summary.protocols.values():
      for name, value in recalls.percent.items():
        low, high = recalls.intervals[name]
        assert f"{value:.2f} ({low:.1f}-{high:.1f})" in text


def test_the_reference_that_is_kept_is_said_to_be(results):
  assert "kept in its ranking" in tables.describe(
    dataclasses.replace(results, exclude_reference=False)
  )


@pytest.mark.parametrize(
  ("selection", "also", "expected"),
  [
    ("last", None, "last checkpoint (step 7)"),
    ("last", "best", "last checkpoint (step 7), which is the best by val_split/R@10 on these "
                     "queries, too"),
    ("best", None, "best checkpoint (step 7), chosen by val_split/R@10 on these queries"),
    ("best", "last", "best checkpoint (step 7), chosen by val_split/R@10 on these queries, which "
                     "is the last one, too"),
  ],
)  # fmt: skip
def test_how_the_checkpoint_was_chosen(results, selection, also, expected):
  results = dataclasses.replace(results, selection=selection, also=also)
  assert results.describe_selection() == expected


def test_categories_stand_below_their_mean(tmp_path):
  splits = made_up.split(tmp_path, "dress"), made_up.split(tmp_path, "shirt")
  results = made_up.evaluation(made_up.config(), made_up.dataset(*splits)).results
  text = tables.results_as_text(results)
  for part in ("val_split, gallery 50 (mean of 2)", "dress: val_split, gallery 25",
               "shirt: original_split, gallery 30"):  # fmt: skip
    assert part in text


def test_columns_are_aligned():
  rows = (("a", (Cell("1.00", "0.5-1.5"), Cell("2"))), ("longer", (Cell("-"), Cell("33"))))
  text = tables.as_text(Table("Title", ("", "x", "y"), rows, "A note."))
  assert text.splitlines() == [
    "Title",
    "                       x   y",
    "  a       1.00 (0.5-1.5)   2",
    "  longer               -  33",
    "A note.",
  ]


def test_a_table_without_rows_is_its_note():
  assert tables.as_text(Table("Title", ("", "x"), (), "None.")) == "Title\nNone."


def test_a_recall_that_was_not_measured_is_a_dash():
  recalls = Recalls({"R@1": 12.34}, {"R@1": (10.0, 15.0)})
  assert tables.recall_cells(recalls, ["R@1", "R@7"]) == (Cell("12.34", "10.0-15.0"), Cell("-"))


def test_a_cut_off_as_large_as_the_gallery_is_said_to_say_nothing(tmp_path):
  config, split = made_up.config(), made_up.split(tmp_path)
  config.eval.recall_at = (1, 10, 25)
  results = made_up.evaluation(config, made_up.dataset(split)).results
  text = tables.results_as_text(results)
  assert "R@25 of val_split say nothing: a gallery of 25 images has no more." in text
  assert "of original_split say nothing" not in text
