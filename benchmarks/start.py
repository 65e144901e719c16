"""Seconds from the start of main.py to the record of its first step: a first and a second start.

PYTHONPATH=. python benchmarks/start.py --config=configs/demo.py --config.data.root=data/demo

Takes the flags of main.py but for --workdir and --compilation_cache, which are temporary folders:
the first start compiles, the second has what the first compiled. Prints one line of JSON, with the
processor seconds of all threads. The data must be there.
"""

import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

_MAIN = pathlib.Path(__file__).parents[1] / "main.py"


def processor_seconds() -> float:
  """Of all processes that were started here and have ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def measured(flags: list[str], folder: pathlib.Path, name: str) -> dict[str, float]:
  """One start in a work directory of its own; the training is ended behind its first step.

  Raises:
    RuntimeError: it ended before.
  """
  record, before = folder / name / "metrics.jsonl", processor_seconds()
  command = [
    sys.executable, str(_MAIN), *flags, "--config.log_every_steps=1",
    f"--workdir={folder / name}", f"--compilation_cache={folder / 'compiled'}",
  ]  # fmt: skip
  start = time.perf_counter()
  training = subprocess.Popen(command, stdout=subprocess.DEVNULL)
  try:
    while not record.exists() or not record.stat().st_size:
      if training.poll() is not None:
        raise RuntimeError(f"{' '.join(command)}: ended with status {training.returncode}")
      time.sleep(0.02)
    seconds = time.perf_counter() - start
  finally:
    training.kill()
    training.wait()
  return {"seconds": seconds, "processor_seconds": processor_seconds() - before}


def main(flags: list[str]) -> None:
  with tempfile.TemporaryDirectory() as folder:
    found = {name: measured(flags, pathlib.Path(folder), name) for name in ("first", "second")}
  print(json.dumps({"benchmark": "start", **found}))


if __name__ == "__main__":
  main(sys.argv[1:])
