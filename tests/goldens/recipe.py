"""Deterministic weights and inputs for the parity tests.  numpy only.

Every array is a pure function of its name and shape, so no weight has to be
stored: the 32-bit CRC of the UTF-8 name seeds a PCG64 generator, and the
generator draws float32 standard normals in C order.

    param("local.local_fc.weight", (1024, 2048))   -> float32 array
    image("eval.src", (3, 3, 64, 64))              -> float32 array

Names are the PyTorch state-dict names with a model prefix ("local." or
"global."), shapes are the PyTorch shapes (Linear: out x in, Conv: out x in x k
..., LSTM: 4H x in with gate order i, f, g, o, Embedding: rows x dim).
"""

import zlib

import numpy as np

RECIPE_VERSION = 1


def rng(name):
  """PCG64 generator seeded by the CRC-32 of the name."""
  return np.random.Generator(np.random.PCG64(zlib.crc32(name.encode("utf-8"))))


def normal(name, shape, scale=1.0, dtype=np.float32):
  """float32 N(0, scale^2) array, drawn in C order."""
  z = rng(name).standard_normal(size=tuple(int(s) for s in shape), dtype=np.float32)
  return np.asarray(z * np.float32(scale), dtype=dtype)


def kind(name, shape):
  """Which rule a parameter or buffer falls under, from its name and rank."""
  last = name.rsplit(".", 1)[-1]
  if last == "relative_position_bias_table":
    return "rel_pos"
  if last == "num_batches_tracked":
    return "counter"
  if last == "running_mean":
    return "running_mean"
  if last == "running_var":
    return "running_var"
  if last == "loss_weight":
    return "loss_weight"
  if last == "p" and len(shape) == 1:
    return "gem_p"
  if name.endswith("embedding_layer.weight"):
    return "embedding"
  if last.startswith("bias"):
    return "bias"
  if last.startswith("weight") and len(shape) == 1:
    return "norm_weight"
  if last.startswith("weight") and len(shape) >= 2:
    return "weight"
  raise KeyError("no rule for %s %s" % (name, tuple(shape)))


def param(name, shape, kind_=None):
  """Value of a parameter or buffer.

  rel_pos       0.2 N                       embedding     0.5 N
  running_mean  0.05 N                      running_var   1 + 0.1 |N|
  norm_weight   1 + 0.1 N                   bias          0.02 N
  loss_weight   10                          gem_p         3
  counter       0 (int64)                   weight        N / sqrt(fan_in)

  fan_in is the product of all dimensions but the first.
  """
  shape = tuple(int(s) for s in shape)
  k = kind_ or kind(name, shape)
  if k == "counter":
    return np.zeros(shape, np.int64)
  if k == "loss_weight":
    return np.full(shape, 10.0, np.float32)
  if k == "gem_p":
    return np.full(shape, 3.0, np.float32)
  z = rng(name).standard_normal(size=shape, dtype=np.float32)
  if k == "rel_pos":
    return z * np.float32(0.2)
  if k == "running_mean":
    return z * np.float32(0.05)
  if k == "running_var":
    return np.float32(1) + np.float32(0.1) * np.abs(z)
  if k == "norm_weight":
    return np.float32(1) + np.float32(0.1) * z
  if k == "bias":
    return z * np.float32(0.02)
  if k == "embedding":
    return z * np.float32(0.5)
  if k == "weight":
    fan_in = int(np.prod(shape[1:]))
    return z * np.float32(1.0 / np.sqrt(fan_in))
  raise KeyError(k)


def image(name, shape, scale=1.0):
  """An input tensor: N(0, scale^2); images are N x 3 x H x W."""
  return normal("image:" + name, shape, scale)


def fill(names_and_shapes, prefix=""):
  """{name: shape} -> {name: array}; the prefix enters the seed only."""
  return {n: param(prefix + n, s) for n, s in names_and_shapes.items()}


# ---- how large arrays are stored in the golden files -----------------------


def sample(x, limit=4096):
  """C-order flattened, every k-th element so that at most `limit` remain."""
  flat = np.asarray(x).reshape(-1)
  step = max(1, -(-flat.size // limit))
  return flat[::step], step


def summary(x, limit=4096):
  """dict of sample, step, shape, sum and l2 (the last two in float64)."""
  x = np.asarray(x)
  s, step = sample(x, limit)
  f = x.astype(np.float64).reshape(-1)
  return dict(
    sample=s,
    step=np.int64(step),
    shape=np.asarray(x.shape, np.int64),
    sum=np.float64(f.sum()),
    l2=np.float64(np.sqrt((f * f).sum())),
  )


if __name__ == "__main__":
  w = param("local.local_fc.weight", (1024, 2048))
  print(w.dtype, w.shape, float(w.std() * np.sqrt(2048)), w.reshape(-1)[:4])
  print(image("eval.src", (1, 3, 2, 2)).reshape(-1)[:4])
