"""Composed image retrieval in JAX/Flax."""

import importlib

# Loaded when first used: importing the package alone starts neither JAX nor TensorFlow.
_LAZY = {"Retriever": "crn_jax.catalogue.retriever"}

__all__ = list(_LAZY)


def __getattr__(name: str):
  if name not in _LAZY:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_LAZY[name]), name)
