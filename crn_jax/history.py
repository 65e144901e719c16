"""What a training recorded along the way: metrics.jsonl."""

import dataclasses
import json
import os
import pathlib

import numpy as np

NAME = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class History:
  """Measurements of a training.

  Attributes:
    records: {"step": .., metric: value, ..}, one a step that was recorded, in order of steps.
  """

  records: tuple[dict, ...]

  def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [n] and values [n] of one metric; empty if it was never recorded."""
    found = [(r["step"], r[metric]) for r in self.records if metric in r]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.asarray(steps, int), np.asarray(values, float)

  def metrics(self, prefix: str) -> list[str]:
    """Names of the recorded metrics that begin with `prefix`, in order of first appearance."""
    names = dict.fromkeys(name for record in self.records for name in record)
    return [name for name in names if name.startswith(prefix)]


def read(workdir: str | os.PathLike) -> History:
  """Reads the metrics of a run; without the file (an old run) the history is empty.

  Lines of the same step are merged and the later one holds, as a continued run repeats the steps
  since its last checkpoint. Incomplete lines, which a killed run leaves, are skipped.
  """
  path = pathlib.Path(workdir) / NAME
  steps: dict[int, dict] = {}
  if path.exists():
    for line in path.read_text(errors="replace").splitlines():
      try:
        record = json.loads(line)
        steps.setdefault(int(record["step"]), {}).update(record)
      except (ValueError, KeyError, TypeError):
        continue
  return History(tuple(steps[step] for step in sorted(steps)))
