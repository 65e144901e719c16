"""What the benchmarks of a device share: times, the peak of its matrix products, its memory."""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def device() -> jax.Device:
  """The device that is measured."""
  return jax.devices()[0]


def seconds(call: Callable, repetitions: int) -> dict[str, float]:
  """Median and minimum of calls, each waited for; one more before them is not counted."""
  jax.block_until_ready(call())
  found = []
  for _ in range(repetitions):
    start = time.perf_counter()
    jax.block_until_ready(call())
    found.append(time.perf_counter() - start)
  return {"median_seconds": statistics.median(found), "min_seconds": min(found)}


def product_peak(dtype: str) -> float:
  """FLOP/s of the fastest of a few square matrix products through JAX, in the dtype of a model.

  That of float32 is with the device's default precision, as in training: TF32 on recent cards.
  """
  side = 1024 if device().platform == "cpu" else 8192
  x = jnp.ones((side, side), dtype)
  product = jax.jit(jnp.matmul)
  return 2 * side**3 / seconds(lambda: product(x, x), 10)["min_seconds"]


def peak_gib() -> float | None:
  """Highest use of the device's memory by this process so far; None where it does not say."""
  stats = device().memory_stats()
  return stats["peak_bytes_in_use"] / 2**30 if stats else None
