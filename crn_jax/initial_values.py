"""Initial values without the model: every parameter is drawn by a program of its own.

A module's `init` runs the model, so that its program holds the forward pass beside a random number
generator for every parameter: at full size half a minute of compilation. Here `init` is only
traced. Each parameter's computation, from its PRNG key to its value, is cut out of the trace;
parameters drawn alike share a program, which leaves a few dozen small ones to compile. The values
are those of `jax.jit(init)`, bit by bit.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


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

  def lower(self, arguments: list) -> jax.stages.Lowered:
    function = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, []))
    return jax.jit(lambda *given: function(*given)[0]).lower(*arguments)


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


def _compile(programs: dict[str, tuple[_Drawn, list]]) -> dict[str, jax.stages.Compiled]:
  lowered = [drawn.lower(arguments) for drawn, arguments in programs.values()]
  # XLA compiles outside Python's lock.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    compiled = pool.map(lambda program: program.compile(), lowered)
    return dict(zip(programs, compiled, strict=True))


def _is_key(variable) -> bool:
  return jax.dtypes.issubdtype(variable.aval.dtype, jax.dtypes.prng_key)
