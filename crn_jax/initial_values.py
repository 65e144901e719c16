"""Initial values without the model: every parameter is drawn by a program of its own.

A module's `init` runs the model, so that its program holds the forward pass beside a random number
generator for every parameter: at full size half a minute of compilation. Here `init` is only
traced. Each parameter's computation, from its PRNG key to its value, is cut out of the trace;
parameters drawn alike share a program, which leaves a few dozen small ones to compile. Nine tenths
of such a program make random bits: they are cut off, too, and made by one program for all. The
values are those of `jax.jit(init)`, bit by bit.
"""

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend import random as threefry

# Random bits are made in pieces of so many numbers of 32 bits.
_PIECE = 2**20


def draw(init: Callable, key: jax.Array, *, without: tuple[str, ...] = ()) -> Any:
  """`jax.jit(init)(key)`, compiled faster.

  Args:
    init: PRNG key -> tree of arrays, none of which needs another; what else it computes is not.
    key: its argument, a typed key.
    without: names below which nothing is drawn.

  Returns:
    The tree; a leaf that is not drawn is a `jax.ShapeDtypeStruct`.
  """
  traced, shapes = jax.make_jaxpr(init, return_shape=True)(key)
  paths, tree = jax.tree.flatten_with_path(shapes)
  makers = {variable: i for i, eqn in enumerate(traced.jaxpr.eqns) for variable in eqn.outvars}
  drawn = {
    i: _Drawn.cut(traced.jaxpr, makers, traced.jaxpr.outvars[i])
    for i, (path, _) in enumerate(paths)
    if not any(getattr(entry, "key", None) in without for entry in path)
  }
  given = _given(traced, makers, {v for d in drawn.values() for v in d.given}, key)
  programs = _compile({d.text: (d, [given[v] for v in d.given]) for d in drawn.values()})
  values = {i: programs[d.text](*(given[v] for v in d.given)) for i, d in drawn.items()}
  return jax.tree.unflatten(tree, [values.get(i, shape) for i, (_, shape) in enumerate(paths)])


@dataclasses.dataclass(frozen=True)
class _Drawn:
  """What one value is computed by.

  Attributes:
    jaxpr: the computation.
    given: variables of the whole trace that it starts from: keys, mostly one; constants.
    text: the computation as text; equal for parameters of one shape that are drawn alike.
  """

  jaxpr: core.Jaxpr
  given: tuple
  text: str

  @classmethod
  def cut(cls, whole: core.Jaxpr, makers: dict, value) -> "_Drawn":
    given, eqns = _needed(whole, makers, [value], stop=_is_key)
    jaxpr = whole.replace(constvars=[], invars=list(given), outvars=[value], eqns=eqns)
    return cls(jaxpr, given, str(jaxpr))


@dataclasses.dataclass(frozen=True)
class _Program:
  """Values drawn alike.

  Attributes:
    compiled: takes what is given, and the pieces of bits of each draw.
    draws: of each draw of random bits the position of its key in what is given, and the shape.
  """

  compiled: jax.stages.Compiled
  draws: tuple[tuple[int, tuple[int, ...]], ...]

  def __call__(self, *given: jax.Array) -> jax.Array:
    pieces = [
      [_piece(given[i], first) for first in range(0, math.prod(shape), _PIECE)]
      for i, shape in self.draws
    ]
    return self.compiled(given, pieces)


@jax.jit
def _piece(key: jax.Array, first: int) -> jax.Array:
  """Numbers `first` to `first + _PIECE` of `jax.random.bits(key, shape)`, flat, for any shape.

  A number depends on the key and its place alone ("partitionable" random numbers, JAX's default).
  """
  place = jnp.asarray(first, jnp.uint32) + jnp.arange(_PIECE, dtype=jnp.uint32)
  high, low = threefry.threefry_2x32(
    jax.random.key_data(key), jnp.stack([jnp.zeros_like(place), place])
  )
  return high ^ low


def _in_pieces(eqn, given: list) -> bool:
  """Whether an operation makes random bits that `_piece` can make instead."""
  return (
    eqn.primitive.name == "random_bits"
    and eqn.invars[0] in given
    and str(eqn.invars[0].aval) == "key<fry>[]"
    and eqn.params["bit_width"] == 32
    and jax.config.jax_threefry_partitionable
  )


def _lower(drawn: _Drawn, arguments: list) -> tuple[jax.stages.Lowered, tuple]:
  """See `_Program`, whose `draws` are second."""
  flat = jax.make_jaxpr(functools.partial(_evaluate, drawn.jaxpr))(*arguments)
  given = flat.jaxpr.invars
  bits = [eqn for eqn in flat.jaxpr.eqns if _in_pieces(eqn, given)]
  rest = flat.jaxpr.replace(
    invars=[*given, *(eqn.outvars[0] for eqn in bits)],
    eqns=[eqn for eqn in flat.jaxpr.eqns if eqn not in bits],
  )
  draws = tuple((given.index(eqn.invars[0]), tuple(eqn.params["shape"])) for eqn in bits)

  def value(given, pieces):
    drawn_bits = [
      jnp.concatenate(parts)[: math.prod(shape)].reshape(shape)
      for parts, (_, shape) in zip(pieces, draws, strict=True)
    ]
    return core.jaxpr_as_fun(core.ClosedJaxpr(rest, flat.consts))(*given, *drawn_bits)[0]

  piece = jax.ShapeDtypeStruct((_PIECE,), jnp.uint32)
  pieces = [[piece] * math.ceil(math.prod(shape) / _PIECE) for _, shape in draws]
  return jax.jit(value).lower(tuple(arguments), pieces), draws


def _evaluate(jaxpr: core.Jaxpr, *arguments) -> list:
  """Its results; what it calls is evaluated in its place, so that no operation lies in a call."""
  known = dict(zip(jaxpr.invars, arguments, strict=True))

  def values(variables):
    return [v.val if isinstance(v, core.Literal) else known[v] for v in variables]

  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "jit" and not eqn.params["jaxpr"].consts:
      outputs = _evaluate(eqn.params["jaxpr"].jaxpr, *values(eqn.invars))
    else:
      inputs = list({v: None for v in eqn.invars if not isinstance(v, core.Literal)})
      alone = jaxpr.replace(constvars=[], invars=inputs, outvars=eqn.outvars, eqns=[eqn])
      outputs = core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*values(inputs))
    known.update(zip(eqn.outvars, outputs, strict=True))
  return values(jaxpr.outvars)


def _needed(whole: core.Jaxpr, makers: dict, values: list, stop: Callable) -> tuple[tuple, list]:
  """Variables where the computation of values starts, and its equations in order.

  Args:
    whole: that computes the values.
    makers: variable -> number of the equation that makes it.
    values: variables.
    stop: whether to take a variable as given.
  """
  open_, given, numbers = list(values), {}, set()
  while open_:
    variable = open_.pop()
    if isinstance(variable, core.Literal):
      continue
    if variable not in makers or stop(variable):
      given[variable] = None
    elif makers[variable] not in numbers:
      numbers.add(makers[variable])
      open_ += whole.eqns[makers[variable]].invars
  return tuple(given), [whole.eqns[i] for i in sorted(numbers)]


def _given(traced: core.ClosedJaxpr, makers: dict, wanted: set, key: jax.Array) -> dict:
  """Values of what all drawing starts from; evaluated one operation after another, as they are
  hundreds of equal small ones."""
  whole, wanted = traced.jaxpr, list(wanted)
  _, eqns = _needed(whole, makers, wanted, stop=lambda variable: False)
  part = whole.replace(outvars=wanted, eqns=eqns)
  return dict(
    zip(wanted, core.jaxpr_as_fun(core.ClosedJaxpr(part, traced.consts))(key), strict=True)
  )


def _compile(programs: dict[str, tuple[_Drawn, list]]) -> dict[str, _Program]:
  lowered = [_lower(drawn, arguments) for drawn, arguments in programs.values()]
  # XLA compiles outside Python's lock.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    compiled = pool.map(lambda program: _Program(program[0].compile(), program[1]), lowered)
    return dict(zip(programs, compiled, strict=True))


def _is_key(variable) -> bool:
  return jax.dtypes.issubdtype(variable.aval.dtype, jax.dtypes.prng_key)
