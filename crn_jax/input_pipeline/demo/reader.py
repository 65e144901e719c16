"""The demo data set as one of the registry: drawn where it is not there yet, read as FashionIQ."""

import dataclasses

import ml_collections
import numpy as np

from crn_jax.input_pipeline.checks import folder
from crn_jax.input_pipeline.dataset import Dataset
from crn_jax.input_pipeline.demo import generate
from crn_jax.input_pipeline.readers import fashioniq


def _read(data: ml_collections.ConfigDict, **options) -> Dataset:
  facts = generate.generate(folder.expand(data.root))["ceilings"]
  dataset = fashioniq.SPEC.read(data, **options)
  categories = fashioniq.CATEGORIES if data.category == "all" else (data.category,)
  ceilings = {
    kind: float(np.mean([facts[category][kind] for category in categories]))
    for kind in ("image_only", "text_only")
  }
  return dataclasses.replace(dataset, name=f"demo/{data.category}", ceilings=ceilings)


SPEC = dataclasses.replace(fashioniq.SPEC, name="demo", read=_read)
