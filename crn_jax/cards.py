"""GPUs that a program can be compiled for on a machine without one.

JAX's CUDA plugin (`pip install -e '.[cuda]'`) holds XLA's compiler, which needs no more than a
description of the card. What it cannot do there is to try out how a product is computed best.
"""

import os

import jax

from crn_jax.errors import UserError

# What NVIDIA says of a card, in the words of XLA's DeviceDescription: threads and registers are
# those of a multiprocessor.
_CARDS = {
  "h100": """
    gpu_device_info {
      cuda_compute_capability { major: 9 }
      core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
      threads_per_core_limit: 2048 shared_memory_per_core: 233472
      shared_memory_per_block_optin: 232448
      device_memory_size: 84929347584 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
      %s
    }
    device_description_str: "NVIDIA H100 80GB HBM3"
  """,
  "a100": """
    gpu_device_info {
      cuda_compute_capability { major: 8 }
      core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41
      threads_per_core_limit: 2048 shared_memory_per_core: 167936
      shared_memory_per_block_optin: 166912
      device_memory_size: 84929347584 memory_bandwidth: 2039000000000 l2_cache_size: 41943040
      %s
    }
    device_description_str: "NVIDIA A100-SXM4-80GB"
  """,
  "rtx4090": """
    gpu_device_info {
      cuda_compute_capability { major: 8 minor: 9 }
      core_count: 128 fpus_per_core: 128 clock_rate_ghz: 2.52
      threads_per_core_limit: 1536 shared_memory_per_core: 102400
      shared_memory_per_block_optin: 101376
      device_memory_size: 25282281472 memory_bandwidth: 1008000000000 l2_cache_size: 75497472
      %s
    }
    device_description_str: "NVIDIA GeForce RTX 4090"
  """,
}
_OF_ALL = """
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
"""
# Versions of CUDA and cuDNN of which XLA expects no less than what JAX itself asks for.
_PLATFORM = """
  platform_name: "CUDA"
  dnn_version_info { major: 9 minor: 8 }
  runtime_version { major: 12 minor: 9 }
"""

NAMES = tuple(_CARDS)

# Of `Lowered.compile` for a card. Products that XLA writes itself have a form that it finds by
# trying; those of cuBLAS do not.
COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


def device(name: str) -> jax.Device:
  """A device that programs can be compiled for, but that holds and computes nothing.

  To be called before JAX computes anything, if the machine has no GPU: it tells the plugin, in the
  environment, to do without a driver.

  Args:
    name: of `NAMES`.

  Raises:
    UserError: on another name, or without JAX's CUDA plugin.
  """
  if name not in _CARDS:
    raise UserError(f"--card={name}: there are {', '.join(NAMES)}")
  from jax.experimental import topologies  # Experimental: nobody else should depend on it.

  # Without it the plugin takes itself for broken where there is no driver.
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  try:
    found = topologies.get_topology_desc(
      platform="cuda", target_config=_CARDS[name] % _OF_ALL + _PLATFORM, topology="1x1x1"
    )
  except NotImplementedError as error:
    raise UserError(
      f"--card={name} needs JAX's CUDA plugin, though no GPU: pip install -e '.[cuda]' ({error})"
    ) from error
  return found.devices[0]
