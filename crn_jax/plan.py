"""What a training step needs, before anything is bought: parameters, arithmetic, memory.

Needs neither data nor weights: the step is compiled for shapes alone.
"""

import dataclasses
import json
import math
import sys

import jax
import ml_collections
from jax.extend import core

from crn_jax import cards, platforms, stages, state, training_step
from crn_jax.methods import registry
from crn_jax.methods.base import Method, TrainState
from crn_jax.parallel import AXIS, DataParallel

# Words of the data's captions are not known without the data: about as many as FashionIQ has. Each
# costs word_dim parameters a branch.
VOCABULARY = 5_000

CARD_SIZES = (16, 24, 40, 80)  # GiB.
# Part of a card's memory that JAX takes by default, and that it may be told to take.
_SHARE, _LARGEST_SHARE = 0.75, 0.95
_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"

# Fields that lower the memory, with the values that do.
_LOWER = {"model.dtype": ("bfloat16",), "model.remat": ("dots", "full")}


@dataclasses.dataclass(frozen=True)
class Needs:
  """What a step on one device needs.

  Attributes:
    name: of the configuration.
    platform, device: that the step was compiled for, e.g. 'gpu' and its name.
    batch_size: triplets a step, of two images each.
    vocabulary: words that were assumed.
    parameters: part -> number.
    flops: of the step's matrix products and convolutions.
    memory: kind -> bytes; their sum is the need of the step.
    smaller: changes to the configuration that need less.
  """

  name: str
  platform: str
  device: str
  batch_size: int
  vocabulary: int
  parameters: dict[str, int]
  flops: int
  memory: dict[str, int]
  smaller: list[str]

  @property
  def total(self) -> int:
    """Bytes while a step runs."""
    return sum(self.memory.values())

  def fits(self, gib: int) -> str:
    """'yes', 'no', or the setting with which a card of so many GiB holds the step."""
    if self.total <= _SHARE * gib * 2**30:
      return "yes"
    if self.total <= _LARGEST_SHARE * gib * 2**30:
      return f"with {_VARIABLE}={_LARGEST_SHARE}"
    return "no"

  def to_json(self) -> dict:
    fields = dataclasses.asdict(self)
    fits = {f"{gib} GiB": self.fits(gib) for gib in CARD_SIZES}
    return fields | {"images": 2 * self.batch_size, "total": self.total, "cards": fits}

  def to_text(self) -> str:
    """A table for people to read."""
    triplets = self.batch_size
    lines = [
      f"{self.name}: {triplets} triplets ({2 * triplets} images) a step on one {self.device}",
      "",
      f"parameters{sum(self.parameters.values()):>22,}"
      f"    {', '.join(f'{part} {n:,}' for part, n in self.parameters.items())}",
      f"TFLOP a step{self.flops / 1e12:>20,.3f}    matrix products and convolutions",
      "",
      "memory of a step, GiB",
      *(f"  {kind:<20}{size / 2**30:>10.3f}" for kind, size in self.memory.items()),
      f"  {'all':<20}{self.total / 2**30:>10.3f}",
      "",
      "fits a card of",
      *(f"  {gib:>3} GiB  {self.fits(gib)}" for gib in CARD_SIZES),
      f"less memory: {'; '.join(self.smaller)}",
      "",
      f"{self.vocabulary:,} words are assumed: the data were not read.",
    ]
    if self.platform == "cpu":
      lines.append(
        "The temporaries are those of XLA's program for a CPU, and only a hint: a GPU's differ. "
        "--card=h100 compiles for one."
      )
    return "\n".join(lines)


def plan(
  config: ml_collections.ConfigDict, *, card: str | None = None, as_json: bool = False
) -> str:
  """Compiles a step for one device and describes it, as a table or as JSON.

  Args:
    config: the configuration.
    card: a GPU of `cards.NAMES` that need not be there; None: the device at hand.
    as_json: JSON instead of a table.

  Raises:
    UserError: on a bad configuration or card.
  """
  found = create(config, card)
  return json.dumps(found.to_json(), indent=2) if as_json else found.to_text()


def create(config: ml_collections.ConfigDict, card: str | None = None) -> Needs:
  """See `plan`. Of a training with another one before it, the one before: it needs more."""
  config = stages.fine_tuning(config) or config
  device = cards.device(card) if card else jax.devices()[0]
  step = traced_step(config, device)
  print(f"compiling the step for {device.device_kind} ...", file=sys.stderr, flush=True)
  compiled = step.lowered.compile(cards.COMPILER_OPTIONS if card else None)
  analysis, like = compiled.memory_analysis(), step.state
  return Needs(
    name=config.name,
    platform=device.platform,
    device=device.device_kind,
    batch_size=config.batch_size,
    vocabulary=VOCABULARY,
    parameters={part: _count(like.params[part]) for part in step.method.parts},
    flops=step.flops,
    memory={
      "parameters": _bytes(like.params),
      "moving average": _bytes(like.average),
      "batch statistics": _bytes(like.batch_stats),
      "optimizer": _bytes(like.opt_state),
      "batch": _bytes(step.batch),
      "temporaries": analysis.temp_size_in_bytes,
      # The new state takes the place of the old one.
      "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
    },
    smaller=_smaller(config),
  )


@dataclasses.dataclass(frozen=True)
class TracedStep:
  """The step of a configuration on one device, not compiled yet.

  Attributes:
    method: whose step it is.
    state, batch: its arguments, as shapes.
    flops: of its matrix products and convolutions.
    lowered: what can be compiled.
  """

  method: Method
  state: TrainState
  batch: dict[str, jax.ShapeDtypeStruct]
  flops: int
  lowered: jax.stages.Lowered


def traced_step(config: ml_collections.ConfigDict, device: jax.Device) -> TracedStep:
  """Of one training, not of two in a row."""
  # Both modes compute the same; only this one can be compiled for shapes.
  parallel = DataParallel.create("shard_map", [device])
  method = registry.create(config, VOCABULARY, AXIS)
  like, batch = state.abstract(method), training_step.abstract_batch(method)
  tx = method.optimizer(steps_per_epoch=1, total_steps=1)
  with platforms.tracing_for(device):
    traced = training_step.compiled(method, tx, parallel).trace(like, batch)
    return TracedStep(method, like, batch, flops(traced.jaxpr.jaxpr), traced.lower())


def flops(jaxpr: core.Jaxpr) -> int:
  """Floating point operations of all matrix products and convolutions of a traced program.

  The body of a scan counts as often as it runs (XLA's own analysis counts it once), that of a
  `while` once, of branches the dearest; padding counts.
  """
  total = 0
  for eqn in jaxpr.eqns:
    inner = [flops(part) for part in core.jaxprs_in_params(eqn.params)]
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      length = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
      total += 2 * eqn.outvars[0].aval.size * length
    elif eqn.primitive.name == "conv_general_dilated":
      kernel, numbers = eqn.invars[1].aval, eqn.params["dimension_numbers"]
      total += 2 * eqn.outvars[0].aval.size * kernel.size // kernel.shape[numbers.rhs_spec[0]]
    elif eqn.primitive.name == "scan":
      total += eqn.params["length"] * sum(inner)
    elif eqn.primitive.name == "pallas_call":
      total += math.prod(eqn.params["grid_mapping"].grid) * sum(inner)
    elif eqn.primitive.name == "cond":
      total += max(inner)
    else:
      total += sum(inner)
  return total


def _smaller(config: ml_collections.ConfigDict) -> list[str]:
  fields = ["a lower batch_size", "a lower data.image_size"]
  for name, values in _LOWER.items():
    group, field = name.split(".")
    if field in config[group] and config[group][field] not in values:
      fields.append(f"{name}={values[-1]}")
  return [*fields, "a smaller backbone"]


def _count(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
