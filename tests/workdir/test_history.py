"""What is read from metrics.jsonl."""

import json

import numpy as np

from crn_jax.workdir import history


def write(folder, *lines):
  (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_series_holds_the_steps_at_which_it_was_recorded(tmp_path):
  write(tmp_path, '{"step": 2, "a": 1.5}', '{"step": 4, "b": 7}', '{"step": 6, "a": 2}')
  steps, values = history.read(tmp_path).series("a")
  assert steps.tolist() == [2, 6]
  assert values.tolist() == [1.5, 2.0]


def test_losses_and_recalls_of_a_step_are_one_record(tmp_path):
  write(tmp_path, '{"step": 2, "a": 1}', '{"step": 2, "b": 3}')
  assert history.read(tmp_path).records == ({"step": 2, "a": 1, "b": 3},)


def test_records_are_in_order_of_steps_and_the_later_line_counts(tmp_path):
  write(tmp_path, '{"step": 4, "a": 1}', '{"step": 2, "a": 2}', '{"step": 4, "a": 3}')
  steps, values = history.read(tmp_path).series("a")
  assert (steps.tolist(), values.tolist()) == ([2, 4], [2, 3])


def test_damaged_lines_are_left_out(tmp_path):
  whole = '{"step": 2, "a": 1}'
  write(tmp_path, whole, "", "[1]", "7", '{"a": 1}', '{"step": "x"}', '{"step": 3, "a"')
  assert [record["step"] for record in history.read(tmp_path).records] == [2]
  (tmp_path / "metrics.jsonl").write_bytes(whole.encode() + b"\n\xff\xfe\x00\n")
  assert [record["step"] for record in history.read(tmp_path).records] == [2]


def test_nan_is_read_as_such(tmp_path):
  write(tmp_path, json.dumps({"step": 1, "a": float("nan")}))
  _, values = history.read(tmp_path).series("a")
  assert np.isnan(values).tolist() == [True]


def test_metrics_by_prefix_in_order_of_appearance(tmp_path):
  write(tmp_path, '{"step": 1, "train/b": 1, "train/a": 1}', '{"step": 2, "eval/c": 1}')
  assert history.read(tmp_path).metrics("train/") == ["train/b", "train/a"]


def test_a_run_without_the_file_has_an_empty_history(tmp_path):
  found = history.read(tmp_path)
  assert found.records == ()
  steps, values = found.series("a")
  assert len(steps) == len(values) == 0
  assert found.metrics("") == []
