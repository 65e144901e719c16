"""Initial values without the model: every parameter is drawn by a program of its own.

A module's `init` runs the model, so that its program holds the forward pass beside a random number
generator for every parameter: at full size half a minute of compilation. Here `init` is only
traced. Each parameter's computation, from its PRNG key to its value, is cut out of the trace;
parameters drawn alike share a program, which leaves a few dozen small ones to compile. The values
are those of `jax.jit(init)`, bit by bit.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from crn_jax import threefry


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
  """A trace is of very many objects, nearly all of which stay: not worth looking through them."""
  enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if enabled:
      gc.enable()


@_without_garbage_collection()
def draw(init: Callable, key: jax.Array, *, without: tuple[str, ...] = ()) -> Any:
  """`jax.jit(init)(key)`, compiled faster.

  Compiled in threads, where JAX's contexts of the caller (as `jax.enable_x64`) do not hold.

  Args:
    init: PRNG key -> tree of arrays, none of which needs another; what else it computes is not.
    key: its argument, a typed key.
    without: names below which nothing is drawn.

  Returns:
    The tree; a leaf that is not drawn is a `jax.ShapeDtypeStruct`.
  """
  key = threefry.unrolled(key)
  traced, shapes = jax.make_jaxpr(init, return_shape=True)(key)
  paths, tree = jax.tree.flatten_with_path(shapes)
  makers = {variable: i for i, eqn in enumerate(traced.jaxpr.eqns) for variable in eqn.outvars}
  alike = collections.defaultdict(dict)
  for i, (path, _) in enumerate(paths):
    if not any(getattr(entry, "key", None) in without for entry in path):
      drawn = _Drawn.cut(traced.jaxpr, makers, traced.jaxpr.outvars[i])
      alike[drawn.text][i] = drawn
  # What takes longest to run is compiled first, and runs while the others are compiled.
  alike = sorted(alike.values(), key=lambda group: -sum(drawn.size for drawn in group.values()))
  leaves = [shape for _, shape in paths]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    # XLA compiles outside Python's lock.
    programs = pool.map(lambda group: next(iter(group.values())).program(), alike)
    wanted = {v for group in alike for drawn in group.values() for v in drawn.given}
    given = _given(traced, makers, list(wanted), key)
    for program, group in zip(programs, alike, strict=True):
      for i, drawn in group.items():
        [leaves[i]] = program(*(given[v] for v in drawn.given))
  return jax.tree.unflatten(tree, leaves)


@dataclasses.dataclass(frozen=True)
class _Drawn:
  """What one value is computed by.

  Attributes:
    jaxpr: the computation.
    text: the computation as text; equal for parameters of one shape that are drawn alike.
  """

  jaxpr: core.Jaxpr
  text: str

  @classmethod
  def cut(cls, whole: core.Jaxpr, makers: dict, value) -> "_Drawn":
    given, eqns = _needed(whole, makers, [value], stop=_is_key)
    jaxpr = whole.replace(constvars=[], invars=given, outvars=[value], eqns=eqns)
    return cls(jaxpr, str(jaxpr))

  @property
  def given(self) -> list:
    """Variables of the whole trace that it starts from: keys, mostly one; constants."""
    return self.jaxpr.invars

  @property
  def size(self) -> int:
    """How many numbers the value has."""
    return math.prod(self.jaxpr.outvars[0].aval.shape)

  def program(self) -> Callable[..., list[jax.Array]]:
    """Values of what is given -> [the value]; compiled."""
    number = self._everywhere()
    if number is not None:
      value = self.jaxpr.outvars[0].aval
      return lambda: [jnp.array(np.full(value.shape, number, value.dtype))]
    given = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self.given]
    return jax.jit(core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, []))).lower(*given).compile()

  def _everywhere(self) -> Any | None:
    """The number that all of the value is, as where it begins with zeros: nothing to compile."""
    eqns = self.jaxpr.eqns
    if len(eqns) == 1 and eqns[0].primitive.name == "broadcast_in_dim":
      return getattr(eqns[0].invars[0], "val", None)  # Only a literal has a value.
    return None


def _needed(whole: core.Jaxpr, makers: dict, values: list, stop: Callable) -> tuple[list, list]:
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
  return list(given), [whole.eqns[i] for i in sorted(numbers)]


def _given(traced: core.ClosedJaxpr, makers: dict, wanted: list, key: jax.Array) -> dict:
  """Values of what all drawing starts from; evaluated one operation after another, as they are
  hundreds of equal small ones."""
  _, eqns = _needed(traced.jaxpr, makers, wanted, stop=lambda variable: False)
  part = traced.jaxpr.replace(outvars=wanted, eqns=eqns)
  values = core.jaxpr_as_fun(core.ClosedJaxpr(part, traced.consts))(key)
  return dict(zip(wanted, values, strict=True))


def _is_key(variable) -> bool:
  return jax.dtypes.issubdtype(variable.aval.dtype, jax.dtypes.prng_key)
