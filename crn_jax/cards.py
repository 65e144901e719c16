"""GPUs that a program can be compiled for on a machine without one.

JAX's CUDA plugin (`pip install -e '.[cuda]'`) holds XLA's compiler, which needs no more than a
description of the card. What it cannot do there is to try out how a product is computed best.
"""

import os

import jax

from crn_jax.errors import UserError

# What NVIDIA says of a card, in the words of XLA's DeviceDescription: a "core" is a multiprocessor.
_CARDS = {
  "h100": {
    "description": "NVIDIA H100 80GB HBM3",
    "cuda_compute_capability": "{ major: 9 }",
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "threads_per_core_limit": 2_048,
    "shared_memory_per_core": 233_472,
    "shared_memory_per_block_optin": 232_448,
    "device_memory_size": 84_929_347_584,
    "memory_bandwidth": 3_352_320_000_000,
    "l2_cache_size": 52_428_800,
  },
}
_CARDS["a100"] = _CARDS["h100"] | {
  "description": "NVIDIA A100-SXM4-80GB",
  "cuda_compute_capability": "{ major: 8 }",
  "core_count": 108,
  "fpus_per_core": 64,
  "clock_rate_ghz": 1.41,
  "shared_memory_per_core": 167_936,
  "shared_memory_per_block_optin": 166_912,
  "memory_bandwidth": 2_039_000_000_000,
  "l2_cache_size": 41_943_040,
}
_CARDS["rtx4090"] = {
  "description": "NVIDIA GeForce RTX 4090",
  "cuda_compute_capability": "{ major: 8 minor: 9 }",
  "core_count": 128,
  "fpus_per_core": 128,
  "clock_rate_ghz": 2.52,
  "threads_per_core_limit": 1_536,
  "shared_memory_per_core": 102_400,
  "shared_memory_per_block_optin": 101_376,
  "device_memory_size": 25_282_281_472,
  "memory_bandwidth": 1_008_000_000_000,
  "l2_cache_size": 75_497_472,
}
_OF_ALL = {
  "threads_per_block_limit": 1_024,
  "threads_per_warp": 32,
  "shared_memory_per_block": 49_152,
  "block_dim_limit_x": 2_147_483_647,
  "block_dim_limit_y": 65_535,
  "block_dim_limit_z": 65_535,
  "registers_per_core_limit": 65_536,
  "registers_per_block_limit": 65_536,
}
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
      platform="cuda", target_config=_described(**_CARDS[name]), topology="1x1x1"
    )
  except NotImplementedError as error:
    raise UserError(
      f"--card={name} needs JAX's CUDA plugin, though no GPU: pip install -e '.[cuda]' ({error})"
    ) from error
  return found.devices[0]


def _described(description: str, **fields) -> str:
  """A card as XLA reads it: a GpuTargetConfig in protobuf's text format."""
  lines = [f"{name}: {value}" for name, value in (fields | _OF_ALL).items()]
  described = "\n".join(lines)
  return (
    f'gpu_device_info {{\n{described}\n}}\ndevice_description_str: "{description}"\n{_PLATFORM}'
  )
