"""Evaluation: Recall@K of both FashionIQ protocols, per kind of query and kind of text.

`val_split` ranks the union of the queries' images (VAL, CLVC-Net, CRN), `original_split` the whole
list of the category (CLIP4Cir and the challenge); the same model scores higher on the first.
"""

import json
import os
import pathlib

import ml_collections
import numpy as np

from crn_jax import ranking
from crn_jax.encode import Encoded, Encoder
from crn_jax.input_pipeline.dataset import EvalSplit
from crn_jax.input_pipeline.datasets import Dataset
from crn_jax.input_pipeline.vocabulary import Vocabulary

QUERY_KINDS = ("composed", "image_only", "text_only")


def evaluate(
  encoder: Encoder, variables, dataset: Dataset, vocabulary: Vocabulary, checkpoint_step: int
) -> tuple[dict, dict[str, Encoded]]:
  """Encodes and ranks every split of a data set.

  Args:
    encoder: compiled encoders.
    variables: {'params', 'batch_stats'}, placed by the encoder's `parallel.replicate`.
    dataset: what to evaluate on.
    vocabulary: of the run.
    checkpoint_step: training step of the variables, for the record.

  Returns:
    Results as written to eval.json (see docs/evaluation.md), and the vectors of each split.
  """
  config = encoder.config
  encoded = {s.name: encoder.encode(variables, s, vocabulary) for s in dataset.evals}
  by_split = {s.name: split_results(encoded[s.name], s, config) for s in dataset.evals}
  results = {
    "dataset": dataset.name,
    "checkpoint_step": int(checkpoint_step),
    "captions": config.data.captions,
    "exclude_reference": config.eval.exclude_reference,
    "best_metric": config.eval.best_metric,
    "breakdown_protocol": _breakdown_protocol(config),
    **average(list(by_split.values())),
  }
  if len(by_split) > 1:
    results["categories"] = by_split
  if dataset.ceilings:
    results["ceilings"] = dataset.ceilings
  return results, encoded


def split_results(encoded: Encoded, split: EvalSplit, config: ml_collections.ConfigDict) -> dict:
  """Recalls of one split in percent: by protocol, by kind of query, by kind of text.

  The last two are given for the protocol of eval.best_metric.
  """
  queries = dict(
    zip(
      QUERY_KINDS,
      (encoded.composed, encoded.images[split.queries.reference], encoded.text_only),
      strict=True,
    )
  )
  protocols = {}
  for protocol, gallery in split.galleries.items():
    ranks = query_ranks(queries["composed"], encoded, split, protocol, config)
    protocols[protocol] = {"gallery": len(gallery), **_recalls(ranks, config)}
  chosen = _breakdown_protocol(config)
  ranks = {k: query_ranks(q, encoded, split, chosen, config) for k, q in queries.items()}
  results = {
    "n_queries": len(split.queries),
    "protocols": protocols,
    "by_query": {kind: _recalls(ranks[kind], config) for kind in QUERY_KINDS},
  }
  if split.queries.kinds:
    kinds = np.asarray(split.queries.kinds)
    results["by_text_kind"] = {
      str(kind): {
        "n_queries": int(np.sum(kinds == kind)),
        **_recalls(ranks["composed"][kinds == kind], config),
      }
      for kind in np.unique(kinds)
    }
  return results


def gallery_positions(gallery: np.ndarray, rows: np.ndarray, n_images: int) -> np.ndarray:
  """Position in the gallery of each image row, -1 where it is absent.

  Args:
    gallery: [g] image rows in gallery order.
    rows: [n] image rows.
    n_images: number of images of the split.
  """
  position = np.full(n_images, -1)
  position[gallery] = np.arange(len(gallery))
  return position[rows]


def excluded_positions(
  split: EvalSplit, protocol: str, config: ml_collections.ConfigDict
) -> np.ndarray:
  """[queries] gallery position that a query does not rank (its own reference), or -1."""
  if not config.eval.exclude_reference:
    return np.full(len(split.queries), -1)
  return gallery_positions(
    split.galleries[protocol], split.queries.reference, len(split.image_paths)
  )


def query_ranks(
  queries: np.ndarray,
  encoded: Encoded,
  split: EvalSplit,
  protocol: str,
  config: ml_collections.ConfigDict,
) -> np.ndarray:
  """[queries] int, 0-based rank of each query's target in a protocol's gallery."""
  gallery = split.galleries[protocol]
  target = gallery_positions(gallery, split.queries.target, len(split.image_paths))
  return ranking.target_ranks(
    queries, encoded.images[gallery], target, excluded_positions(split, protocol, config)
  )


def average(results: list[dict]) -> dict:
  """Mean of the recalls over categories, as FashionIQ averages; counts are sums."""
  first = results[0]
  out = {}
  for key, value in first.items():
    values = [r[key] for r in results if key in r]
    if isinstance(value, dict):
      out[key] = average(values)
    elif key in ("n_queries", "gallery"):
      out[key] = sum(values)
    else:
      out[key] = float(np.mean(values))
  return out


def best_metric(results: dict) -> float:
  """The value that chooses the best checkpoint, e.g. 'val_split/R@10'.

  Raises:
    ValueError: if eval.best_metric names nothing that was measured.
  """
  protocol, _, metric = results["best_metric"].partition("/")
  try:
    return results["protocols"][protocol][metric]
  except KeyError:
    known = [f"{p}/{m}" for p, v in results["protocols"].items() for m in v if m != "gallery"]
    raise ValueError(
      f"eval.best_metric = {results['best_metric']!r} is not measured; choose one of {known}"
    ) from None


def format_table(results: dict) -> str:
  """A table for people: recalls with the protocol spelled out."""
  metrics = [m for m in next(iter(results["protocols"].values())) if m != "gallery"]
  width = 34
  lines = [
    f"{results['dataset']}, checkpoint at step {results['checkpoint_step']}: "
    f"{results['n_queries']} queries; captions {results['captions']}; reference image "
    f"{'excluded from' if results['exclude_reference'] else 'kept in'} its ranking",
    "",
    "Recall in percent".ljust(width) + "".join(m.rjust(8) for m in metrics),
  ]

  def row(name, recalls):
    lines.append(name.ljust(width) + "".join(f"{recalls[m]:8.2f}" for m in metrics))

  sections = results.get("categories", {})
  for protocol, recalls in results["protocols"].items():
    total = "gallery " + str(recalls["gallery"])
    if sections:
      row(f"{protocol} (mean of {len(sections)})", recalls)
      for name, section in sections.items():
        own = section["protocols"][protocol]
        row(f"  {name} (gallery {own['gallery']})", own)
    else:
      row(f"{protocol} ({total})", recalls)
  lines.append(f"by query, {results['breakdown_protocol']}")
  for kind, recalls in results["by_query"].items():
    row(f"  {kind.replace('_', ' ')}", recalls)
  if "by_text_kind" in results:
    lines.append(f"by kind of text, {results['breakdown_protocol']}")
    for kind, recalls in results["by_text_kind"].items():
      row(f"  {kind} ({recalls['n_queries']} queries)", recalls)
  if "ceilings" in results:
    ceilings = ", ".join(f"{k.replace('_', ' ')} {v:.1f}" for k, v in results["ceilings"].items())
    lines.append(f"best possible R@10 of half a query on this synthetic set: {ceilings}")
  return "\n".join(lines)


def write_results(results: dict, path: str | os.PathLike) -> None:
  """Writes eval.json; the file appears complete or not at all."""
  path = pathlib.Path(path)
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(results, indent=2) + "\n")
  os.replace(partial, path)


def _recalls(ranks: np.ndarray, config: ml_collections.ConfigDict) -> dict[str, float]:
  return {f"R@{k}": v for k, v in ranking.recall_at_k(ranks, config.eval.recall_at).items()}


def _breakdown_protocol(config: ml_collections.ConfigDict) -> str:
  return config.eval.best_metric.partition("/")[0]
