"""Training on kept features, and computing them: combiner epochs a second, images a second, memory.

PYTHONPATH=. python benchmarks/features.py

Prints two lines of JSON. The first: epochs of the combiner of `clip4cir` at a batch of 4096 on
random features, an epoch being one compiled loop. The second: the features of drawn images by small
towers, from files to the folder that keeps them, and by how much the process grows meanwhile.
"""

import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
from absl import app, flags

from benchmarks import measure
from benchmarks.retrieval import peak_growth_mb
from configs import demo
from crn_jax import compilation_cache, plan, state, training_step
from crn_jax.input_pipeline.demo import generate
from crn_jax.input_pipeline.registry import open_dataset
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.methods import registry
from crn_jax.parallel import AXIS, DataParallel
from crn_jax.retrieval import features

_WIDTH = flags.DEFINE_integer("width", 512, "Of the features: 512 of CLIP-B/32, 768 of CLIP-L/14.")
_EPOCHS = flags.DEFINE_integer("epochs", 3, "Epochs that are timed.", lower_bound=1)
_IMAGES = flags.DEFINE_bool("images", True, "Compute features of images, too.")

# FashionIQ's: training triplets, their images, and texts that are drawn of them.
_TRIPLETS, _FILES, _TEXTS = 18_000, 46_609, 72_000


def combiner(width: int, epochs: int) -> dict:
  """Epochs a second."""
  config = demo.get_config("clip4cir")
  config.batch_size, config.clip4cir.dropout = 4096, 0.5
  config.model.encoder.vector_dim = width
  parallel = DataParallel.create("shard_map", [measure.device()])
  method = registry.create(config, plan.VOCABULARY, AXIS)
  tx = method.optimizer(steps_per_epoch=1, total_steps=1)
  current = parallel.replicate(state.initial(method, tx, ""))
  steps = _TRIPLETS // config.batch_size
  rng = np.random.default_rng(0)
  shape = (config.batch_size, steps)
  rows = np.stack([rng.integers(0, n, shape) for n in (_FILES, _FILES, _TEXTS)], axis=-1)
  batch = parallel.shard({
    "rows": rows.astype(np.int32),
    "images": rng.standard_normal((_FILES, width), np.float32),
    "texts": rng.standard_normal((_TEXTS, width), np.float32),
  })  # fmt: skip
  traced = training_step.compiled(method, tx, parallel).trace(current, batch)
  epoch = traced.lower().compile()
  found = []
  for _ in range(epochs + 1):
    start = time.perf_counter()
    current, metrics = epoch(current, batch)
    jax.block_until_ready(metrics)
    found.append(time.perf_counter() - start)
  seconds, work = statistics.median(found[1:]), plan.flops(traced.jaxpr.jaxpr)
  return {
    "benchmark": "combiner",
    "device": measure.device().device_kind,
    "width": width,
    "batch_size": config.batch_size,
    "steps_per_epoch": steps,
    "parameters": sum(x.size for x in jax.tree.leaves(current.params)),
    "seconds_per_epoch": seconds,
    "epochs_per_second": 1 / seconds,
    "tflop_per_epoch": work / 1e12,
    "share_of_products": work / seconds / measure.product_peak("float32"),
  }


def images(folder: pathlib.Path) -> dict:
  """Features of 8,100 drawn images by the demo's towers, behind those of 2,160 others."""
  # All garments that there are, of all categories.
  generate.generate(folder / "data", n_train_images=2700, n_train_triplets=13_500)
  config = demo.get_config("clip4cir")
  config.data.update(dataset="fashioniq", category="all")
  config.data.update(root=str(folder / "data"), features=str(folder / "features"))
  config.num_epochs = 1
  dataset = open_dataset(config.data, train=True)
  words = Vocabulary.build(
    dataset.train.captions, markers="tokens", max_words=config.data.max_words
  )
  method = registry.create(config, len(words), AXIS)
  towers = jax.device_get(method.init_encoder(jax.random.key(0)))
  parallel = DataParallel.create("shard_map", [measure.device()])

  def compute(data):
    weights = features.digests(method, towers)
    return features.compute(method, towers, weights, parallel, data, words)

  def seconds():
    start = time.perf_counter()
    compute(dataset)
    return time.perf_counter() - start

  compute(dataclasses.replace(dataset, train=None))  # Libraries, threads, programs.
  taken = []
  grown = peak_growth_mb(lambda: taken.append(seconds()))
  n = len(dataset.train.image_paths)
  return {
    "benchmark": "features",
    "images": n,
    "seconds": taken[0],
    "images_per_second": n / taken[0],
    "grown_mb": grown,
    "seconds_when_kept": seconds(),
  }


def main(_):
  compilation_cache.enable("none")
  print(json.dumps(combiner(_WIDTH.value, _EPOCHS.value)), flush=True)
  if _IMAGES.value:
    with tempfile.TemporaryDirectory() as folder:
      print(json.dumps(images(pathlib.Path(folder))), flush=True)


if __name__ == "__main__":
  app.run(main)
