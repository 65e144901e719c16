"""All methods on equal terms: the tables of docs/results.md.

python benchmarks/method_table.py                                  # The synthetic demo set.
python benchmarks/method_table.py --root=PATH --workdir=runs/other  # Images in FashionIQ's layout.

Every method is trained with the demo's small ResNet, LSTM, optimizer and budget, and evaluated
after its last update. A run is one of `crn_jax.train` in a folder of its own; finished runs are
only read again, so that the script can be stopped and continued, and compared with
`main.py --mode=compare`.
"""

import json
import pathlib

import jax
import numpy as np
from absl import app, flags, logging

from configs import demo, presets
from crn_jax import train
from crn_jax.input_pipeline.tokenizers import base as tokenizers
from crn_jax.methods import registry
from crn_jax.workdir import history

_WORKDIR = flags.DEFINE_string("workdir", "runs/method_table", "Folder of the runs.")
_ROOT = flags.DEFINE_string("root", None, "Folder in FashionIQ's layout; if none, the demo set.")
_PREPARED = flags.DEFINE_string("prepared", "", "Folder of its prepared images, if there is one.")
_METHODS = flags.DEFINE_list(
  "methods",
  [p for p in presets.PRESETS if p not in (*presets.TOWER_PRESETS, "crn_released")],
  "Presets.",
)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Trainings of each.")
_EPOCHS = flags.DEFINE_integer("epochs", 4, "Of each training.")


def get_config(preset: str, seed: int):
  """The demo's configuration of a method, on equal terms."""
  config = demo.get_config(f"{preset},{presets.EQUAL}")
  config.seed = seed
  config.num_epochs = config.eval.every_epochs = _EPOCHS.value
  config.log_every_steps = 20
  if _ROOT.value:
    config.data.update(dataset="fashioniq", root=_ROOT.value, category="all")
    config.data.update(prepared=_PREPARED.value, cache_images=not _PREPARED.value)
  return config


def measure(config, folder: pathlib.Path) -> dict:
  """Trains, or finds the run trained: recalls, parameters, milliseconds a step (fastest 20)."""
  train.train(config, folder)
  results = json.loads((folder / "eval.json").read_text())
  _, rates = history.read(folder).series("train/examples_per_second")
  words = tokenizers.load(folder / "vocab.json")
  variables = jax.eval_shape(registry.create(config, len(words)).init, jax.random.key(0))
  return {
    "recalls": results["by_query"]["composed"],
    "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
    "step": 1000 * config.batch_size / np.max(rates),  # Others may use the machine meanwhile.
  }


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  found = {preset: [] for preset in _METHODS.value}
  for seed in range(_SEEDS.value):
    for preset in _METHODS.value:
      folder = pathlib.Path(_WORKDIR.value) / f"{preset}_seed{seed}"
      found[preset].append(measure(get_config(preset, seed), folder))
      print(preset, seed, {k: found[preset][-1]["recalls"][k] for k in ("R@1", "R@10")}, flush=True)
  print("| method | R@1 | R@10 | R@50 | R@10, each seed | parameters | ms a step, fastest |")
  print("|-|-|-|-|-|-|-|")
  for preset, runs in found.items():
    means = [np.mean([r["recalls"][f"R@{k}"] for r in runs]) for k in (1, 10, 50)]
    each = ", ".join(f"{r['recalls']['R@10']:.1f}" for r in runs)
    step = min(r["step"] for r in runs)
    print(f"| `{preset}` | {means[0]:.1f} | {means[1]:.1f} | {means[2]:.1f} | {each} "
          f"| {runs[0]['parameters']:,} | {step:.0f} |")  # fmt: skip


if __name__ == "__main__":
  app.run(main)
