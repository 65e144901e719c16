"""Compositions by name, for `models/single.py`."""

from crn_jax.models.composition import concat, dcnet, film, image_only, text_only, tirg, val
from crn_jax.models.composition.base import Composition

COMPOSITIONS: dict[str, type[Composition]] = {
  "image_only": image_only.ImageOnly,
  "text_only": text_only.TextOnly,
  "concat": concat.Concat,
  "film": film.FiLM,
  "tirg": tirg.TIRG,
  "tirg_map": tirg.TIRGMap,
  "val": val.VAL,
  "dcnet": dcnet.DCNet,
}
