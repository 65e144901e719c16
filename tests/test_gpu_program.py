"""Kernels are counted as a GPU launches them, and bytes as it moves them."""

import pathlib

import pytest

from benchmarks import gpu_program

TEXT = pathlib.Path(__file__).with_name("goldens").joinpath("scan_for_a_gpu.hlo").read_text()


def test_a_loop_counts_as_often_as_it_runs_and_a_slice_as_what_it_takes():
  """x [64, 256] in bfloat16, five times tanh(x @ w[i]), every result kept in float32."""
  x, w, number = 64 * 256 * 2, 256 * 256 * 2, 4
  launched = gpu_program.kernels(TEXT)
  found = {(k.kind, k.launches, k.size) for k in launched}
  assert found == {
    ("copy", 1, 2 * x),
    ("copy", 1, 2 * number),  # Of a constant.
    ("loop_broadcast_fusion", 1, 5 * 2 * x),  # Zeros.
    ("loop_dynamic_slice_fusion", 5, 2 * w + number),
    ("__cublas$lt$matmul", 5, 2 * x + w),
    ("loop_convert_fusion", 5, 2 * x),
    ("loop_dynamic_update_slice_fusion", 5, x + 2 * x + number),
    ("loop_add_fusion", 5, 2 * number),
  }
  flops = {k.kind: k.flops for k in launched if k.flops}
  assert flops == {"__cublas$lt$matmul": 2 * 64 * 256 * 256}
  seconds = {k.kind: k.seconds for k in launched}
  assert seconds["loop_convert_fusion"] == pytest.approx(5 * (2e-6 + 2 * x / 3e12))


def test_a_table_begins_with_what_takes_longest():
  head, first, *rest = gpu_program.table(gpu_program.kernels(TEXT)).splitlines()
  assert head.split() == ["in", "program", "launches", "GB", "ms", "kind"]
  assert first.split() == ["1", "5", "0.00", "0.01", "loop_dynamic_slice_fusion"]
  assert len(rest) == 6
