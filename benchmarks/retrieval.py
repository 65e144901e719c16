"""Time and memory of exact retrieval against the score product alone.

python benchmarks/retrieval.py

Ranks the targets of as many queries in as large a gallery as Fashion200k has, on random features:
the reference image is excluded, and every image with the target's caption is a hit. Both
measurements go through the same blocks of queries and alternate; their medians are compared.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from crn_jax.retrieval import metrics, ranking

_SCALE = flags.DEFINE_float("scale", 1.0, "Part of the queries to rank; times are extrapolated.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measurements of each.")

# Fashion200k's test split; the width of CRN's joined vectors; images that share a caption.
_QUERIES, _GALLERY, _WIDTH, _IMAGES_PER_CAPTION = 33_480, 29_789, 2048, 4


def random_vectors(rng: np.random.Generator, n: int) -> np.ndarray:
  """[n, width] float32 rows of unit length."""
  vectors = ranking.empty_features(n, _WIDTH)  # As the encoder's.
  rng.standard_normal(out=vectors, dtype=np.float32)
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  return vectors


def score_product(queries: np.ndarray, gallery: np.ndarray) -> None:
  """The scores of all queries, block by block, and nothing else."""
  product = jax.jit(lambda q, g: jnp.matmul(q, g.T, precision=jax.lax.Precision.HIGHEST))
  gallery = jax.device_put(gallery)
  for start in range(0, len(queries), ranking.BLOCK_SIZE):
    product(queries[start : start + ranking.BLOCK_SIZE], gallery).block_until_ready()


def resident_mb(field: str) -> float:
  """Memory of this process in MB: "VmRSS" now, "VmHWM" at its peak."""
  with open("/proc/self/status") as status:
    line = next(line for line in status if line.startswith(field))
  return int(line.split()[1]) / 1000


def peak_growth_mb(function) -> float:
  """By how much the process grows at most while a function runs."""
  with open("/proc/self/clear_refs", "w") as control:
    control.write("5")  # Sets the peak back to what is used now.
  before = resident_mb("VmRSS")
  function()
  return resident_mb("VmHWM") - before


def seconds(function) -> float:
  """Wall-clock time of one call."""
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def main(_):
  rng = np.random.default_rng(0)
  n = max(1, round(_SCALE.value * _QUERIES / ranking.BLOCK_SIZE)) * ranking.BLOCK_SIZE
  n = min(n, _QUERIES)
  queries, gallery = random_vectors(rng, n), random_vectors(rng, _GALLERY)
  captions = rng.integers(0, _GALLERY // _IMAGES_PER_CAPTION, _GALLERY)
  target = captions[rng.integers(0, _GALLERY, n)]
  reference = rng.integers(0, _GALLERY, n)

  def recall():
    ranks = ranking.target_ranks(queries, gallery, target, reference, labels=captions)
    return metrics.recall_at_k(ranks, (1, 10, 50))

  score_product(queries[: ranking.BLOCK_SIZE], gallery[:_WIDTH])  # Starts JAX.
  growth = peak_growth_mb(recall)
  score_product(queries[: ranking.BLOCK_SIZE], gallery)  # Compiles, as the line above did.
  times = {"score product": [], "recall": []}
  for _ in range(_ROUNDS.value):
    times["score product"].append(seconds(lambda: score_product(queries, gallery)))
    times["recall"].append(seconds(recall))
  extrapolated = "" if n == _QUERIES else f", extrapolated from {n:,} queries"
  print(f"{_QUERIES:,} queries x {_GALLERY:,} images x {_WIDTH}{extrapolated}")
  for name, measured in times.items():
    print(f"  {name:14} {statistics.median(measured) * _QUERIES / n:6.1f} s")
  ratio = statistics.median(times["recall"]) / statistics.median(times["score product"])
  print(f"  ratio          {ratio:6.3f}    (at most 1.1 is wanted)")
  print(f"  peak memory beyond the features {growth:.0f} MB    (at most 300 MB)")


if __name__ == "__main__":
  app.run(main)
