"""Every data set by its name, and opening the one that a configuration names.

A new data set is a module of `readers/` that ends with its `SPEC`, and a line in `DATASETS`
(docs/extending.md). Neither this module nor a reader imports JAX or TensorFlow: printing results
needs the protocols, and must not start a device.
"""

import dataclasses

import ml_collections

from crn_jax.errors import UserError
from crn_jax.input_pipeline.checks import folder
from crn_jax.input_pipeline.dataset import Dataset, fingerprint
from crn_jax.input_pipeline.demo import reader as demo
from crn_jax.input_pipeline.readers import circo, cirr, fashion200k, fashioniq, shoes

# Name -> what there is to know about it.
DATASETS = {
  spec.name: spec
  for spec in (
    fashioniq.SPEC,
    shoes.SPEC,
    fashion200k.SPEC,
    cirr.SPEC,
    circo.SPEC,
    demo.SPEC,
  )
}


def protocols() -> dict[str, str]:
  """What a protocol ranks and what it counts as a hit: name -> description, of all data sets."""
  return {name: text for spec in DATASETS.values() for name, text in spec.protocols.items()}


def open_dataset(
  config: ml_collections.ConfigDict, *, train: bool, known_digest: str | None = None
) -> Dataset:
  """Reads the annotations and verifies the images; draws the demo data set if it is not there yet.

  Args:
    config: the `data` part of the configuration.
    train: whether the training data are needed.
    known_digest: `image_digest` of an earlier call; unchanged images are not verified again.

  Raises:
    UserError: on an unknown data set or on bad data; one message lists everything that is wrong
      and says how to go on. Or the prepared images are others, see `prepared.open_store`.
  """
  folder.check_choice("data.dataset", config.dataset, tuple(DATASETS))
  spec = DATASETS[config.dataset]
  if train and not spec.trains:
    raise UserError(
      f"data.dataset: {spec.name} has no training split, it is for evaluation only; train on "
      f"another data set and evaluate that run on {spec.name} with --mode=eval (docs/data.md)"
    )
  store = None
  if config.prepared:
    from crn_jax.input_pipeline import prepared  # Late: TensorFlow takes seconds to import.

    store = prepared.open_store(spec, config)
  dataset = spec.read(config, train=train, known_digest=known_digest, store=store)
  if store is not None:
    splits = ((dataset.train,) if train else ()) + dataset.evals
    store.check(tuple(dict.fromkeys(path for split in splits for path in split.image_paths)))
  if train:
    return dataclasses.replace(dataset, fingerprint=fingerprint(dataset.train))
  return dataset
