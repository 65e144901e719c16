"""The benchmark of catalogues runs, and counts right."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.catalogue import made

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_indexing_and_load_are_measured(tmp_path):
  run = made.trained(tmp_path / "run")
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  done = subprocess.run(
    [sys.executable, str(ROOT / "benchmarks" / "catalogue.py"), f"--model={run}", "--pictures=40",
     "--clients=3", "--batch_size=2", "--seconds=0.5"],
    cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  index, opened, *asked = map(json.loads, done.stdout.splitlines())
  assert index["pictures"] == 40
  assert index["pictures_per_second"] > 0 < opened["seconds"]
  expected = [("query", 1), ("query", 3), ("http", 1), ("http", 3)]
  for found, (measured, clients) in zip(asked, expected, strict=True):
    assert (found["measured"], found["clients"], found["errors"]) == (measured, clients, 0)
    # Each client asks without a pause, and the last ones are waited for.
    assert clients <= found["queries"] <= found["queries_per_second"] * 60
    assert 0 < found["p50_ms"] <= found["p95_ms"]
