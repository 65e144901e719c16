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

  Records of the same step, of its losses and its recalls, are merged.
  """
  steps: dict[int, dict] = {}
  for record in read_records(pathlib.Path(workdir) / NAME):
    steps.setdefault(record["step"], {}).update(record)
  return History(tuple(steps[step] for step in sorted(steps)))


def read_records(path: str | os.PathLike) -> list[dict]:
  """Records of the file, a line each; none if there is no file.

  Incomplete lines, which a killed run leaves, are left out.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return []
  records = []
  for line in path.read_text(errors="replace").splitlines():
    try:
      record = json.loads(line)
      records.append(record | {"step": int(record["step"])})
    except (ValueError, KeyError, TypeError):
      continue
  return records
