"""Filters: expressions of Milvus over the metadata, and what is wrong with one."""

import contextlib
import json
from collections.abc import Iterator, Sequence

import pymilvus

from crn_jax.errors import UserError


def quote(text: str) -> str:
  """A text as a filter writes it."""
  for character, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n"), ("\r", "\\r")):
    text = text.replace(character, escaped)
  return f'"{text}"'


def equals(name: str, value: str | int | float | bool) -> str:
  """The filter of what has this value of a field; whatever the value, it says no more than that."""
  return f"{name} == {quote(value) if isinstance(value, str) else json.dumps(value)}"


def named(keys: Sequence[str]) -> str:
  """The filter of the rows with these primary keys."""
  return f"key in [{', '.join(map(quote, keys))}]"


@contextlib.contextmanager
def said_of(filter_: str) -> Iterator[None]:
  """Says of an error that it is about the filter, if there is one."""
  try:
    yield
  except pymilvus.MilvusException as error:
    if not filter_:
      raise
    raise UserError(
      f"filter {filter_!r}: not understood ({first_line(error)}); write e.g. "
      f'kind == "dress" and price < 50'
    ) from error


def first_line(error: pymilvus.MilvusException) -> str:
  """What an error says, without the place that it points at."""
  return (error.message or str(error)).strip().split("\n")[0]
