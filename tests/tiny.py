"""A CRN small enough to train in seconds, on a drawn data set of FashionIQ's format."""

import pathlib

from configs import default
from crn_jax.input_pipeline.demo import generate


def draw(folder: pathlib.Path) -> pathlib.Path:
  """Draws a small data set; returns its root."""
  root = folder / "data"
  generate.generate(root, image_size=32, n_train_images=40, n_train_triplets=40, n_val_images=40,
                n_val_queries=30)  # fmt: skip
  return root


def config_file(folder: pathlib.Path) -> pathlib.Path:
  """Draws a small data set, and writes the file that gives its `config` to a program."""
  path, root = folder / "tiny.py", str(draw(folder))
  path.write_text(
    f"from tests import tiny\n\n\ndef get_config():\n  return tiny.config({root!r})\n"
  )
  return path


def config(root: pathlib.Path, preset: str = "crn"):
  """One category, 40 triplets: two steps of 16 an epoch and a ragged end."""
  c = default.get_config(preset)
  c.name = "tiny"
  c.num_epochs = 2
  c.batch_size = 16
  c.data.root = str(root)
  c.data.category = "dress"
  c.data.max_words = 20
  c.data.image_size = c.data.resize = 32
  c.model.pretrained = ""
  if c.model.backbone.name.startswith("resnet"):
    c.model.backbone.update(depths=(1, 1), width=8)
  else:
    c.model.backbone.update(embed_dim=16, depths=(1, 1), num_heads=(1, 2), patch_size=8)
  c.model.map_dim = c.model.feature_dim = 32
  c.model.word_dim = 16
  c.optimizer.learning_rate = 1e-3
  c.eval.batch_size = 16
  c.eval.recall_at = (1, 10)
  return c
