"""The training step as XLA compiles it for a GPU, on a machine that needs none.

PYTHONPATH=. python benchmarks/gpu_program.py --card=h100 --config=configs/fashioniq_dress.py
    --config.model.dtype=bfloat16

Needs JAX's CUDA plugin (pip install -e '.[cuda]'). Prints, by kind, the kernels of a step, the
bytes that they read and write and a rough time, and a line of JSON. No time is measured but that of
compilation, which is without XLA's trying out of kernels. --hlo=FILE keeps the compiled program.
"""

import collections
import dataclasses
import json
import math
import re
import time

import jax
from absl import app, flags
from ml_collections import config_flags

from crn_jax import cards, plan, pretrained, stages

_CONFIG = config_flags.DEFINE_config_file("config", "configs/fashioniq_dress.py", "Configuration.")
_CARD = flags.DEFINE_enum("card", "h100", cards.NAMES, "GPU to compile for.")
_HLO = flags.DEFINE_string("hlo", None, "File for the text of the compiled program.")

# Operations of a scheduled program that start a kernel, or a call of a library.
_LAUNCHED = ("fusion", "custom-call", "copy", "sort", "scatter")
# s8 is what cuBLAS takes its workspace as, not read or written by itself.
_SIZES = {
  "s8": 0, "token": 0, "pred": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4,
  "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z\-]+)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")

# A rough idea of a large card: bytes and floating point operations a second that kernels reach
# (of bfloat16; float32 takes longer), and seconds before one does anything.
_BANDWIDTH, _PRODUCTS, _START = 3e12, 6e14, 2e-6


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a program: `%name = shape operation(operands), attributes`."""

  name: str
  shape: str
  operation: str
  operands: tuple[str, ...]
  attributes: str

  @property
  def arrays(self) -> list[tuple[str, list[int]]]:
    """Dtype and sides of the result, or of its parts."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", self.shape)
    return [(dtype, [int(n) for n in sides.split(",") if n]) for dtype, sides in found]

  @property
  def size(self) -> int:
    """Bytes of the result."""
    return sum(_SIZES[dtype] * math.prod(sides) for dtype, sides in self.arrays)

  @property
  def kind(self) -> str:
    """Name without its number; of a call of a library, what is called."""
    if found := re.search(r'custom_call_target="([^"]*)"', self.attributes):
      return found[1]
    return re.sub(r"[.\d]+$", "", self.name)


@dataclasses.dataclass(frozen=True)
class Kernels:
  """Equal launches: how many a step, the bytes that each reads and writes, products' arithmetic."""

  kind: str
  launches: int
  size: int
  flops: int

  @property
  def seconds(self) -> float:
    """A rough time of all launches."""
    return self.launches * (_START + max(self.size / _BANDWIDTH, self.flops / _PRODUCTS))


def computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  """Computation -> name -> instruction, and the computation that is called first."""
  found, entry, current = {}, "", None
  for line in text.splitlines():
    if start := _COMPUTATION.match(line):
      current = found.setdefault(start[2], {})
      entry = start[2] if start[1] else entry
    elif line.startswith("}"):
      current = None
    elif current is not None and (parts := _INSTRUCTION.match(line)):
      name, shape, operation, rest = parts.groups()
      operands, _, attributes = rest.partition(")")
      operands = tuple(re.findall(r"%([\w.\-]+)", operands))
      current[name] = Instruction(name, shape, operation, operands, attributes)
  return found, entry


def kernels(text: str) -> list[Kernels]:
  """What a compiled program launches: a loop's body as often as it runs, no conditions."""
  found, entry = computations(text)
  out, waiting = [], [(entry, 1)]
  while waiting:
    name, times = waiting.pop()
    for instruction in found[name].values():
      if instruction.operation == "while":
        body = re.search(r"body=%([\w.\-]+)", instruction.attributes)[1]
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes)
        waiting.append((body, times * (int(trips[1]) if trips else 1)))
      elif instruction.operation in _LAUNCHED:
        size, flops = _moved(instruction, found, name), _flops(instruction, found[name])
        out.append(Kernels(instruction.kind, times, size, flops))
  return out


def _flops(instruction: Instruction, around: dict[str, Instruction]) -> int:
  """Of a call of cuBLAS; else 0."""
  contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
  if instruction.operation != "custom-call" or not contracted:
    return 0
  (_, sides), (_, out) = around[instruction.operands[0]].arrays[0], instruction.arrays[0]
  axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])]
  return 2 * math.prod(out) * math.prod(sides[axis] for axis in axes)


def _moved(instruction: Instruction, found: dict, computation: str) -> int:
  """Bytes read and written, as if caches held nothing and everything were needed once."""
  called = re.search(r"calls=%([\w.\-]+)", instruction.attributes)
  if not called:
    around = found[computation]
    read = sum(around[name].size for name in instruction.operands if name in around)
    return read + instruction.size
  inside = found[called[1]]
  read = sum(_read(x, inside) for x in inside.values() if x.operation == "parameter")
  # An update in place writes the part that is new.
  updates = [x for x in inside.values() if x.operation == "dynamic-update-slice"]
  kept = sum(x.size - inside[x.operands[1]].size for x in updates)
  return read + max(instruction.size - kept, 0)


def _read(parameter: Instruction, inside: dict[str, Instruction]) -> int:
  """Bytes of a fusion's parameter that are read: of one that is only sliced, the slices."""
  names, total = [parameter.name], 0
  while names:
    name = names.pop()
    for user in inside.values():
      if name not in user.operands:
        continue
      first = user.operands[0] == name
      if user.operation == "bitcast":
        names.append(user.name)
      elif first and user.operation in ("dynamic-slice", "slice", "gather"):
        total += user.size
      elif not (first and user.operation == "dynamic-update-slice"):
        return parameter.size
  return min(total, parameter.size)


def compiled(config, card: str) -> tuple[dict, str]:
  """Times and sizes of the compiled step, and its text."""
  device = cards.device(card)
  start = time.perf_counter()
  step = plan.traced_step(config, device)
  lowered_at, processor = time.perf_counter(), time.process_time()
  program = step.lowered.compile(cards.COMPILER_OPTIONS)
  memory = program.memory_analysis()
  return {
    "benchmark": "gpu_program",
    "config": config.name,
    "card": device.device_kind,
    "jax": jax.__version__,
    "dtype": config.model.dtype,
    "batch_size": config.batch_size,
    "tflop_per_step": step.flops / 1e12,
    "stablehlo_lines": step.lowered.as_text().count("\n"),
    "lower_seconds": lowered_at - start,
    "compile_seconds": time.perf_counter() - lowered_at,
    # Without that of the assembler of NVIDIA, which is a process of its own.
    "compile_processor_seconds": time.process_time() - processor,
    # The state is updated in place.
    "state_gib": memory.alias_size_in_bytes / 2**30,
    "temporaries_gib": memory.temp_size_in_bytes / 2**30,
  }, program.as_text()


def table(launched: list[Kernels]) -> str:
  """Kernels by kind, those that take longest first."""
  by_kind = collections.defaultdict(list)
  for x in launched:
    by_kind[x.kind].append(x)
  rows = [
    (kind, len(xs), *(sum(values) for values in zip(*map(_totals, xs), strict=True)))
    for kind, xs in by_kind.items()
  ]
  return "\n".join(
    ["  in program  launches        GB        ms  kind"]
    + [
      f"{n:>12}{launches:>10}{gb:>10.2f}{ms:>10.2f}  {kind}"
      for kind, n, launches, gb, ms in sorted(rows, key=lambda row: -row[-1])
    ]
  )


def _totals(x: Kernels) -> tuple[int, float, float]:
  """Launches, GB, milliseconds."""
  return x.launches, x.launches * x.size / 1e9, 1e3 * x.seconds


def main(_):
  config = _CONFIG.value
  pretrained.describe(config)
  config = stages.fine_tuning(config) or config
  config.model.pretrained = ""
  found, text = compiled(config, _CARD.value)
  if _HLO.value:
    with open(_HLO.value, "w", encoding="utf-8") as file:
      file.write(text)
  launched = kernels(text)
  print(table(launched))
  launches, gb, ms = (sum(values) for values in zip(*map(_totals, launched), strict=True))
  print(json.dumps(found | {"launches": launches, "gb_moved": gb, "rough_milliseconds": ms}))


if __name__ == "__main__":
  app.run(main)
