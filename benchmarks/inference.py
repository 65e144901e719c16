"""Encoding alone: made-up images on the device -> vectors of one branch, beside timm's backbone.

PYTHONPATH=. python benchmarks/inference.py --config=configs/fashioniq_dress.py
    --config.model.dtype=bfloat16

Prints a line of JSON for each: this program and, where PyTorch and timm are installed, timm's model
of the same backbone in eager mode and with torch.compile, in the same dtype on the same images.
timm's is the backbone with its pooling; ours has the image head beside it. Needs what
benchmarks/train_step.py needs; the parameters are random.
"""

import importlib.util
import json
import os

# JAX would otherwise take most of the memory before PyTorch can ask for some.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks import measure
from crn_jax import compilation_cache, initial_values, plan, pretrained, stages
from crn_jax.methods import registry

_CONFIG = config_flags.DEFINE_config_file("config", "configs/fashioniq_dress.py", "Configuration.")
_BATCH = flags.DEFINE_integer("batch_size", 256, "Images.", lower_bound=1)
_PART = flags.DEFINE_string("part", "local", "Branch, of a method that has them.")
_REPETITIONS = flags.DEFINE_integer("repetitions", 10, "Batches that are timed.", lower_bound=1)
_TORCH = flags.DEFINE_bool("torch", True, "Measure timm, too, where it is installed.")

# model.backbone.name -> timm's name.
_TIMM = {f"swin_{size}": f"swin_{size}_patch4_window7_224" for size in
         ("tiny", "small", "base", "large")} | {"resnet50": "resnet50"}  # fmt: skip


def ours(config, images: np.ndarray, part: str, repetitions: int) -> dict:
  """Images a second from uint8 pictures to vectors."""
  method = registry.create(config, plan.VOCABULARY)
  drawn = initial_values.draw(method.init, jax.random.key(config.seed))

  def encode(variables, pictures):
    pictures = method.preprocessing.normalize(pictures)
    if part not in method.parts:  # Of a method without branches.
      return method.encode_images(variables, pictures)[1]
    module, own = method.branches[part], {c: tree[part] for c, tree in variables.items()}
    return module.apply(own, pictures, train=False, method=module.encode_image).vector

  variables, placed = jax.device_put((drawn, jnp.asarray(images)), measure.device())
  traced = jax.jit(encode).trace(variables, placed)
  compiled = traced.lower().compile()
  times = measure.seconds(lambda: compiled(variables, placed), repetitions)
  peak_memory = measure.peak_gib()
  product = measure.product_peak(config.model.dtype)
  return {
    **_line("crn_jax", config, images, times),
    "device": measure.device().device_kind,
    "share_of_products": plan.flops(traced.jaxpr.jaxpr) / times["median_seconds"] / product,
    "peak_memory_gib": peak_memory,
  }


def timms(config, images: np.ndarray, compiled: bool, repetitions: int) -> dict:
  """Images a second of timm's model from normalised pictures to pooled features."""
  import timm
  import torch

  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, config.model.dtype)
  model = timm.create_model(_TIMM[config.model.backbone.name], num_classes=0).eval()
  model = model.to(device, dtype)
  if device == "cuda":
    model = model.to(memory_format=torch.channels_last)
  pictures = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).to(dtype) / 255
  encode = torch.compile(model) if compiled else model

  def run():
    with torch.inference_mode():
      encode(pictures)
    if device == "cuda":
      torch.cuda.synchronize()

  times = measure.seconds(run, repetitions)
  name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
  what = f"timm {timm.__version__}, {'torch.compile' if compiled else 'eager'}"
  return {**_line(what, config, images, times), "device": name}


def _line(what: str, config, images: np.ndarray, times: dict) -> dict:
  return {
    "benchmark": "inference",
    "program": what,
    "backbone": config.model.encoder.get("family") or config.model.backbone.name,
    "dtype": config.model.dtype,
    "batch_size": len(images),
    **times,
    "images_per_second": len(images) / times["median_seconds"],
  }


def main(_):
  config = _CONFIG.value
  pretrained.describe(config)
  config = stages.fine_tuning(config) or config  # Of two trainings, the one on pictures.
  compilation_cache.enable("none")
  side = config.data.image_size
  images = np.random.default_rng(0).integers(0, 256, (_BATCH.value, side, side, 3), np.uint8)
  print(json.dumps(ours(config, images, _PART.value, _REPETITIONS.value)), flush=True)
  known = config.model.backbone.name in _TIMM and not config.model.encoder
  if not known or not _TORCH.value or not all(map(importlib.util.find_spec, ("torch", "timm"))):
    return
  for compiled in (False, True):
    print(json.dumps(timms(config, images, compiled, _REPETITIONS.value)), flush=True)


if __name__ == "__main__":
  app.run(main)
