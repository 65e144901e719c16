"""How long a checkpoint holds up the training loop, and how long it takes to write.

PYTHONPATH=. python benchmarks/checkpoints.py --config=configs/fashioniq_dress.py

Prints one line of JSON. The state is that of the configuration, with random values, and a program
that changes it in its own memory stands for the training step. Needs about three times the state's
size of memory, and of disk in --folder. Methods on towers need the description in the configuration
(configs/demo.py:clip4cir).
"""

import json
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks import measure
from crn_jax import parallel, plan, state
from crn_jax.methods import registry
from crn_jax.workdir import checkpoint

_CONFIG = config_flags.DEFINE_config_file("config", "configs/fashioniq_dress.py", "Configuration.")
_SAVES = flags.DEFINE_integer("saves", 4, "Checkpoints that are timed.", lower_bound=1)
_FOLDER = flags.DEFINE_string("folder", None, "On the disk that is written to; else a temporary.")


def random_state(method):
  """Values that do not compress."""
  rng = np.random.default_rng(0)

  def values(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return rng.standard_normal(x.shape, np.float32).astype(x.dtype)
    return np.zeros(x.shape, x.dtype)

  return jax.tree.map(values, state.abstract(method))


def seconds(call, *args) -> float:
  """Of a call."""
  start = time.perf_counter()
  call(*args)
  return time.perf_counter() - start


def measured(config, saves: int, folder: pathlib.Path) -> dict:
  """What is printed; the first checkpoint, which compiles the copy, is listed alone."""
  data_parallel = parallel.DataParallel.create("shard_map", [measure.device()])
  step = data_parallel.map(
    lambda current, row: (jax.tree.map(lambda x: x + jnp.ones_like(x), current), jnp.sum(row)),
    outputs=(parallel.REPLICATED, parallel.REPLICATED),
    donate_first=True,
  )
  row = data_parallel.shard(np.zeros((1, 1), np.float32))
  start = random_state(registry.create(config, plan.VOCABULARY))
  size = checkpoint.size_in_bytes(start)
  placed, _ = step(data_parallel.replicate(start), row)
  del start
  fetched, blocked, written = [], [], []
  with checkpoint.Checkpoints(folder) as checkpoints:

    def save(tree):
      checkpoints.save(data_parallel.copy(tree))

    for _ in range(saves + 1):
      placed, _ = step(jax.block_until_ready(placed), row)
      jax.block_until_ready(placed)
      blocked.append(seconds(save, placed))
      written.append(seconds(checkpoints.wait))
      placed, _ = step(placed, row)
      jax.block_until_ready(placed)
      fetched.append(seconds(data_parallel.fetch, placed))
  return {
    "device": measure.device().device_kind,
    "gigabytes": size / 1e9,
    "arrays": len(jax.tree.leaves(placed)),
    "copied_on_device": parallel.has_room(measure.device(), size),
    "first_blocked_seconds": blocked[0],
    "blocked_seconds": statistics.median(blocked[1:]),
    "fetch_seconds": statistics.median(fetched[1:]),
    "until_written_seconds": statistics.median(written[1:]),
  }


def main(_):
  with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
    print(json.dumps(measured(_CONFIG.value, _SAVES.value, pathlib.Path(folder))))


if __name__ == "__main__":
  app.run(main)
