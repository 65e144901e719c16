"""Filters that people put together from values, which never become part of a filter's code."""

import json
import math
from collections.abc import Mapping

from crn_jax.catalogue.filters import equals
from crn_jax.errors import UserError

# Of one filter.
_MAX_VALUES, _MAX_TEXT = 100, 1_000


def expression(facets: Mapping[str, Mapping], where: object) -> str:
  """The filter that lets through what has all of the properties given.

  Args:
    facets: of the catalogue, see `indexing.facets`.
    where: field -> list of values, of which one must match, or {"least": x, "greatest": y}, of
      which one may be missing. May come from anywhere, and so be anything.

  Returns:
    An expression for `Query.filter`; "" if nothing is asked for.

  Raises:
    UserError: a field that the catalogue does not have, or something else than values.
  """
  if not isinstance(where, Mapping):
    raise UserError('filters: expected an object, e.g. {"kind": ["dress"], "price": {"least": 9}}')
  return " and ".join(part for name in where if (part := _part(facets, name, where[name])))


def _part(facets: Mapping[str, Mapping], name: object, asked: object) -> str:
  if name not in facets:
    there = ", ".join(facets) or "none"
    raise UserError(f"filters: there is no field {name!r} in this catalogue; there are: {there}")
  if isinstance(asked, list) and len(asked) <= _MAX_VALUES and all(map(_is_value, asked)):
    return f"({' or '.join(equals(name, value) for value in asked)})" if asked else ""
  if isinstance(asked, Mapping) and asked.keys() <= {"least", "greatest"}:
    bounds = [(">=", asked.get("least")), ("<=", asked.get("greatest"))]
    if all(value is None or _is_number(value) for _, value in bounds):
      said = [f"{name} {sign} {json.dumps(value)}" for sign, value in bounds if value is not None]
      return " and ".join(said)
  raise UserError(
    f'filters: {name}: expected a list of at most {_MAX_VALUES} values, or {{"least": x, '
    f'"greatest": y}} of numbers'
  )


def _is_value(value: object) -> bool:
  if isinstance(value, str):
    return len(value) <= _MAX_TEXT
  return isinstance(value, bool) or _is_number(value)


def _is_number(value: object) -> bool:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  # Beyond it no two integers that follow each other are different numbers for Milvus.
  return math.isfinite(value) and abs(value) < 2**63
