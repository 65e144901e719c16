"""What the page shows, as HTML; all that comes from people or files is escaped."""

import base64
import functools
import io
from collections.abc import Sequence

import numpy as np

from crn_jax.catalogue.page.dialogue import Reference, Trail
from crn_jax.catalogue.retriever import Attention, Hit
from crn_jax.catalogue.store import Row
from crn_jax.reports import page
from crn_jax.reports.pictures import attention, discs

_TILE = 128  # Side of a map, in pixels.


@functools.cache
def _parts():
  # Empty, as the pictures lie beside the page.
  return (
    page.environment("crn_jax.catalogue.page")
    .get_template("parts.html", globals={"base": ""})
    .module
  )


def heading(name: str, n: int) -> str:
  return str(_parts().heading(name, n))


def results(found: Sequence[Hit | Row]) -> str:
  """Pictures, each with a button that makes it the reference; scores where there are some."""
  shown = [
    {
      "id": one.id,
      "score": getattr(one, "score", None),
      "metadata": [(key, _short(value)) for key, value in one.metadata.items()],
    }
    for one in found
  ]
  return str(_parts().results(shown))


def card(reference: Reference | None) -> str:
  return str(_parts().card(reference))


def trail(steps: Trail) -> str:
  return str(_parts().trail(steps.steps, steps.at))


def status(text: str, unknown: Sequence[str] = ()) -> str:
  return str(_parts().status(text, unknown))


def failure(sentence: str) -> str:
  return str(_parts().failure(sentence[:1].upper() + sentence[1:]))


def examples(texts: Sequence[str]) -> str:
  return str(_parts().examples(texts))


def attention_maps(found: Attention, text: str) -> str:
  """A table: a row a part of the model, a column a word."""
  row = attention.AttentionRow(
    reference=found.picture,
    text=text,
    outcome="",
    words=tuple(map(attention.Word, found.words, found.roles)),
    attention=found.maps,
    sums_over={part: sums_over for part, (sums_over, _) in found.notes.items()},
    notes={part: note for part, (_, note) in found.notes.items()},
  )
  columns = attention.columns(row)
  parts = []
  for part in found.maps:
    multiples = [column.multiples[part] for column in columns]
    end = discs.scale_end(np.stack(multiples))
    drawn = [_embedded(discs.overlay(found.picture, values, end, _TILE)) for values in multiples]
    parts.append((part, row.notes[part], drawn))
  return str(_parts().attention(parts, [column.label for column in columns]))


def _embedded(image) -> str:
  buffer = io.BytesIO()
  image.save(buffer, "WEBP", quality=85)
  return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _short(value: str | int | float | bool) -> str:
  if isinstance(value, bool):
    return "yes" if value else "no"
  return f"{value:g}" if isinstance(value, float) else str(value)
