import json
import os
import subprocess
import sys

import pytest

from crn_jax.workdir import history, logs


def test_records_are_read_back(tmp_path):
  with logs.Log(tmp_path, 0) as log:
    log.scalars(2, 0.5, {"train/local/total": 1.5})
    log.scalars(4, 1.0, {"eval/val_split/R@10": 20.0})
  assert history.read_records(tmp_path / "metrics.jsonl") == [
    {"step": 2, "epoch": 0.5, "train/local/total": 1.5},
    {"step": 4, "epoch": 1.0, "eval/val_split/R@10": 20.0},
  ]
  assert list(tmp_path.glob("events.out.tfevents.*"))


def test_a_continued_run_records_no_step_twice(tmp_path):
  path = tmp_path / "metrics.jsonl"
  lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
  path.write_text("\n".join(lines) + '\n{"step": 4, "tr')  # killed while it wrote
  with logs.Log(tmp_path, 2) as log:
    log.scalars(3, 1.5, {"a": 1.0})
  assert [record["step"] for record in history.read_records(path)] == [1, 2, 3]


def test_no_file_has_no_records(tmp_path):
  assert history.read_records(tmp_path / "metrics.jsonl") == []


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
  from tests.workdir.test_checkpoint import file_size_limit

  path = tmp_path / "metrics.jsonl"
  logs.append_line(path, "a" * 90)
  with file_size_limit(100), pytest.raises(OSError):
    logs.append_line(path, "b" * 90)
  logs.append_line(path, "c")
  assert path.read_text() == "a" * 90 + "\nc\n"


def test_memory_of_a_cpu_process_rises_by_what_it_takes():
  """In a process of its own: this one may have used more before."""
  code = """
import numpy as np
from crn_jax.workdir import logs
first = np.ones(2**29, np.uint8)  # More than what importing took and gave back.
before = logs.peak_memory_gib()
second = np.ones(2**28, np.uint8)
held = logs.peak_memory_gib()
del second
print(before, held, logs.peak_memory_gib())
"""
  out = subprocess.run(
    [sys.executable, "-c", code], check=True, capture_output=True, text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)},
  )  # fmt: skip
  before, held, after = map(float, out.stdout.split())
  assert held - before == pytest.approx(0.25, abs=0.02)
  assert after == pytest.approx(held, abs=0.02)  # The peak, not what is held now.
