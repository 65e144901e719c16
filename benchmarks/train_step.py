"""The training step alone, on made-up batches that lie on the device.

PYTHONPATH=. python benchmarks/train_step.py --config=configs/fashioniq_dress.py
    --config.model.dtype=bfloat16

Prints one line of JSON. Needs JAX, Flax, Optax, Orbax and ml_collections, no data and no weights;
the parameters are random. Measures one device; config.batch_size is its own. Methods on towers need
the description in a folder of weights, or in the configuration (configs/demo.py:clip4cir).
"""

import json
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks import measure
from crn_jax import compilation_cache, plan, pretrained, stages, state, training_step
from crn_jax.methods import registry
from crn_jax.parallel import AXIS, DataParallel

_CONFIG = config_flags.DEFINE_config_file("config", "configs/fashioniq_dress.py", "Configuration.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps that are timed.", lower_bound=1)
_CACHE = flags.DEFINE_string(
  "compilation_cache", "none", "As of main.py; 'none' measures a first start."
)


def made_up_batch(method, seed: int = 0) -> dict[str, np.ndarray]:
  """Random pictures with texts that fill all positions, as training gives them to the method."""
  rng = np.random.default_rng(seed)

  def values(shape):
    if shape.dtype == np.bool_:
      return np.ones(shape.shape, bool)
    return rng.integers(0, 256, shape.shape).astype(shape.dtype)  # Of pixels, and of words.

  return {name: values(x) for name, x in training_step.abstract_batch(method).items()}


def measured(config, steps: int) -> dict:
  """What is printed."""
  start = time.perf_counter()
  parallel = DataParallel.create("shard_map", [measure.device()])
  method = registry.create(config, plan.VOCABULARY, AXIS)
  tx = method.optimizer(steps_per_epoch=1_000, total_steps=1_000_000)
  current = parallel.replicate(state.initial(method, tx, config.model.pretrained))
  jax.block_until_ready(current)
  initialised = time.perf_counter()
  batch = parallel.shard(made_up_batch(method))
  traced = training_step.compiled(method, tx, parallel).trace(current, batch)
  lowered = traced.lower()
  lowered_at = time.perf_counter()
  step = lowered.compile()
  compiled_at = time.perf_counter()
  metrics = None

  def one_step():
    nonlocal current, metrics
    current, metrics = step(current, batch)  # The old state's buffers are given away.
    return metrics

  times = measure.seconds(one_step, steps)
  peak_memory = measure.peak_gib()
  dtype = config.model.dtype
  product = measure.product_peak(dtype)
  flops = plan.flops(traced.jaxpr.jaxpr)
  return {
    "benchmark": "train_step",
    "config": config.name,
    "device": measure.device().device_kind,
    "jax": jax.__version__,
    "dtype": dtype,
    "batch_size": config.batch_size,
    **times,
    "triplets_per_second": config.batch_size / times["median_seconds"],
    "tflop_per_step": flops / 1e12,
    "tflops_of_products": product / 1e12,
    "share_of_products": flops / times["median_seconds"] / product,
    "peak_memory_gib": peak_memory,
    "init_seconds": initialised - start,
    "lower_seconds": lowered_at - initialised,
    "compile_seconds": compiled_at - lowered_at,
    "stablehlo_lines": lowered.as_text().count("\n"),
    "finite": bool(np.all([np.isfinite(value) for value in metrics.values()])),
  }


def main(_):
  config = _CONFIG.value
  pretrained.describe(config)
  config = stages.fine_tuning(config) or config  # Of two trainings, the one on pictures.
  config.model.pretrained = ""
  compilation_cache.enable(_CACHE.value)
  print(json.dumps(measured(config, _STEPS.value)))


if __name__ == "__main__":
  app.run(main)
