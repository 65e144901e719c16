"""What a run shows at its end: eval.json and pictures."""

import os
import pathlib

import ml_collections
import numpy as np

from crn_jax import evaluate, pictures, ranking, run
from crn_jax.encode import Encoded
from crn_jax.evaluate import Evaluation
from crn_jax.input_pipeline.dataset import EvalSplit
from crn_jax.input_pipeline.datasets import Dataset

_ROWS = 8
_TOP = 10


def write(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike,
  dataset: Dataset,
  evaluation: Evaluation,
) -> list[pathlib.Path]:
  """Writes eval.json and a retrieval grid a split.

  Returns:
    The paths written.
  """
  workdir = pathlib.Path(workdir)
  results = evaluation.results
  written = [workdir / "eval.json"]
  run.write_json(results, written[0])
  protocol = results["breakdown_protocol"]
  for split in dataset.evals:
    path = workdir / "pictures" / f"retrieval_{split.name}.png"
    title = (
      f"{config.data.dataset}/{split.name}: {protocol}, gallery {len(split.galleries[protocol])}, "
      f"reference {'excluded' if config.eval.exclude_reference else 'kept'}, "
      f"{evaluate.describe_selection(results)}"
    )
    rows = grid_rows(evaluation.encoded[split.name], split, protocol, config)
    pictures.retrieval_grid(rows, path, title=title)
    written.append(path)
  return written


def grid_rows(
  encoded: Encoded, split: EvalSplit, protocol: str, config: ml_collections.ConfigDict
) -> list[pictures.GridRow]:
  """Rows for queries evenly spread over the split, so that the picture does not flatter."""
  gallery = split.galleries[protocol]
  n = len(split.queries)
  chosen = np.unique(np.linspace(0, n - 1, min(_ROWS, n)).astype(int))
  queries = encoded.composed[chosen]
  n_images = len(split.image_paths)
  target = evaluate.gallery_positions(gallery, split.queries.target, n_images)[chosen]
  exclude = evaluate.excluded_positions(split, protocol, config)[chosen]
  vectors = encoded.images[gallery]
  ranks = ranking.target_ranks(queries, vectors, target, exclude)
  top, scores = ranking.top_k(queries, vectors, _TOP, exclude)
  rows = []
  for i, query in enumerate(chosen):
    at = np.flatnonzero(top[i] == target[i])
    rows.append(
      pictures.GridRow(
        reference=split.image_paths[split.queries.reference[query]],
        text=" / ".join(split.queries.texts[query]),
        top=tuple(
          (split.image_paths[gallery[g]], float(s)) for g, s in zip(top[i], scores[i], strict=True)
        ),
        target=split.image_paths[split.queries.target[query]],
        target_position=int(at[0]) if len(at) else None,
        rank=int(ranks[i]) if target[i] >= 0 else None,
      )
    )
  return rows
