"""What each part of CRN brings on the synthetic demo set: the table of docs/demo.md.

python benchmarks/demo_ablation.py --workdir=runs/ablation

Every run is a run of `crn_jax.train` in a folder of its own; finished runs are only evaluated
again, so that the script can be stopped and continued.
"""

import json
import pathlib

import numpy as np
from absl import app, flags, logging

from configs import demo
from crn_jax import train

_WORKDIR = flags.DEFINE_string("workdir", "runs/ablation", "Folder of the runs.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.")
_EPOCHS = flags.DEFINE_integer("epochs", 4, "Epochs of each run.")

# Each row adds one part to the row above; the first also attends to padding and loses the markers.
_ROWS = (
  ("crn_released", "crn_released", {}),
  ("+ feature map", "crn", {"aggregation": "none", "modification": False, "auxiliary": False}),
  ("+ HAT", "crn", {"aggregation": "used", "modification": False, "auxiliary": False}),
  ("+ modification relation", "crn", {"auxiliary": False}),
  ("+ auxiliary relation (crn)", "crn", {}),
)


def get_config(preset: str, parts: dict, seed: int):
  """The demo's configuration with some parts of `crn` left out."""
  config = demo.get_config(preset)
  config.seed = seed
  config.num_epochs = config.eval.every_epochs = _EPOCHS.value
  config.model.aggregation = parts.get("aggregation", config.model.aggregation)
  for relation in ("modification", "auxiliary"):
    if not parts.get(relation, True):
      config.loss[relation] = 0.0
  return config


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  recalls = {name: [] for name, _, _ in _ROWS}
  for seed in range(_SEEDS.value):
    for name, preset, parts in _ROWS:
      folder = pathlib.Path(_WORKDIR.value) / f"{name.strip('+ ').replace(' ', '_')}_seed{seed}"
      train.train(get_config(preset, parts, seed), folder)
      by_query = json.loads((folder / "eval.json").read_text())["by_query"]
      recalls[name].append([by_query["composed"][k] for k in ("R@1", "R@10")])
      print(name, seed, recalls[name][-1], flush=True)
  print("| | R@1 | R@10, mean | R@10, each seed |\n|-|-|-|-|")
  for name, values in recalls.items():
    r1, r10 = np.asarray(values).T
    print(f"| {name} | {r1.mean():.1f} | {r10.mean():.1f} | {', '.join(f'{v:.1f}' for v in r10)} |")


if __name__ == "__main__":
  app.run(main)
