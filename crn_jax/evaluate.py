"""Evaluation: Recall@K in every protocol of a data set, per kind of query and kind of text."""

import dataclasses
from collections.abc import Sequence

import ml_collections
import numpy as np

from crn_jax.input_pipeline.dataset import Dataset, EvalSplit
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.retrieval import ranking
from crn_jax.retrieval.encode import Encoded, Encoder

QUERY_KINDS = ("composed", "image_only", "text_only")

# split name -> protocol -> kind of query -> [queries] int, 0-based rank of the target.
Ranks = dict[str, dict[str, dict[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What an evaluation found.

  Attributes:
    results: as written to eval.json, see docs/evaluation.md.
    encoded: split name -> its vectors.
    ranks: of all targets; kinds of query other than "composed" only in the breakdown protocol.
  """

  results: dict
  encoded: dict[str, Encoded]
  ranks: Ranks


def evaluate(
  encoder: Encoder,
  variables,
  dataset: Dataset,
  vocabulary: Vocabulary,
  checkpoint_step: int,
  selection: str,
) -> Evaluation:
  """Encodes and ranks every split of a data set.

  Args:
    encoder: compiled encoders.
    variables: {'params', 'batch_stats'}, placed by the encoder's `parallel.replicate`.
    dataset: what to evaluate on.
    vocabulary: of the run.
    checkpoint_step: training step of the variables, for the record.
    selection: how the checkpoint was chosen, 'last' or 'best', for the record.
  """
  config = encoder.config
  encoded = {s.name: encoder.encode(variables, s, vocabulary) for s in dataset.evals}
  ranks = {s.name: split_ranks(encoded[s.name], s, config) for s in dataset.evals}
  results = {
    "dataset": dataset.name,
    "checkpoint_step": int(checkpoint_step),
    "selection": selection,
    "captions": caption_use(dataset.evals, config),
    "exclude_reference": config.eval.exclude_reference,
    "best_metric": config.eval.best_metric,
    "breakdown_protocol": breakdown_protocol(config),
    **summarize(dataset.evals, ranks, config),
  }
  if len(dataset.evals) > 1:
    results["categories"] = {s.name: summarize([s], ranks, config) for s in dataset.evals}
  if dataset.ceilings:
    results["ceilings"] = dataset.ceilings
  if dataset.skipped:
    results["skipped"] = dataset.skipped
  return Evaluation(results, encoded, ranks)


def caption_use(splits: Sequence[EvalSplit], config: ml_collections.ConfigDict) -> str:
  """How the captions of a query are used, for the record: "single" if there is nothing to join."""
  single = all(len(text) == 1 for s in splits for text in s.queries.texts)
  return "single" if single and config.data.captions == "joined" else config.data.captions


def split_ranks(
  encoded: Encoded, split: EvalSplit, config: ml_collections.ConfigDict
) -> dict[str, dict[str, np.ndarray]]:
  """Ranks of one split's targets: protocol -> kind of query -> [queries] int."""
  queries = (encoded.composed, encoded.images[split.queries.reference], encoded.text_only)
  by_kind = dict(zip(QUERY_KINDS, queries, strict=True))

  def kinds(protocol):
    return QUERY_KINDS if protocol == breakdown_protocol(config) else ("composed",)

  return {
    protocol: {
      k: query_ranks(by_kind[k], encoded, split, protocol, config) for k in kinds(protocol)
    }
    for protocol in split.galleries
  }


def summarize(splits: Sequence[EvalSplit], ranks: Ranks, config: ml_collections.ConfigDict) -> dict:
  """Recalls in percent: by protocol, by kind of query, by kind of text.

  The last two are given for the protocol of eval.best_metric. Over several splits (categories)
  recalls are means, as FashionIQ averages, and counts are sums.

  Args:
    splits: one or more, with the same protocols.
    ranks: of these splits at least.
    config: the whole configuration.
  """
  chosen = breakdown_protocol(config)

  def recalls(rows):
    return _recalls(list(rows), config.eval.recall_at)

  results = {
    "n_queries": sum(len(s.queries) for s in splits),
    "protocols": {
      protocol: {
        "gallery": sum(len(s.galleries[protocol]) for s in splits),
        **recalls(ranks[s.name][protocol]["composed"] for s in splits),
      }
      for protocol in splits[0].galleries
    },
    "by_query": {k: recalls(ranks[s.name][chosen][k] for s in splits) for k in QUERY_KINDS},
  }
  if all(s.queries.kinds for s in splits):
    results["by_text_kind"] = {}
    for kind in sorted({kind for s in splits for kind in s.queries.kinds}):
      rows = [
        ranks[s.name][chosen]["composed"][np.asarray(s.queries.kinds) == kind] for s in splits
      ]
      rows = [r for r in rows if len(r)]
      results["by_text_kind"][kind] = {"n_queries": sum(map(len, rows)), **recalls(rows)}
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


def gallery_vectors(encoded: Encoded, gallery: np.ndarray) -> np.ndarray:
  """[g, d] vectors of a gallery's images; no copy where it is all images in their order."""
  n = len(encoded.images)
  return encoded.images if np.array_equal(gallery, np.arange(n)) else encoded.images[gallery]


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
  exclude = excluded_positions(split, protocol, config)
  return ranking.target_ranks(
    queries,
    gallery_vectors(encoded, gallery),
    target_labels(split),
    exclude,
    labels=image_labels(split)[gallery],
  )


def image_labels(split: EvalSplit) -> np.ndarray:
  """[n images] int; images of one label are the same target."""
  return np.arange(len(split.image_paths)) if split.groups is None else split.groups


def target_labels(split: EvalSplit) -> np.ndarray:
  """[queries] int, label of every query's target."""
  return image_labels(split)[split.queries.target]


def best_metric(results: dict) -> float:
  """The value that chooses the best checkpoint, e.g. 'val_split/R@10'.

  Raises:
    ValueError: if eval.best_metric names nothing that was measured.
  """
  protocol, _, metric = results["best_metric"].partition("/")
  try:
    return results["protocols"][protocol][metric]
  except KeyError:
    known = [f"{p}/{m}" for p, v in results["protocols"].items() for m in metric_names(v)]
    raise ValueError(
      f"eval.best_metric = {results['best_metric']!r} is not measured; choose one of {known}"
    ) from None


def metric_names(recalls: dict) -> list[str]:
  """Names of the recalls in a part of the results, e.g. ['R@1', 'R@10']."""
  return [name for name in recalls if name.startswith("R@")]


def describe_selection(results: dict) -> str:
  """How the evaluated checkpoint was chosen, in words."""
  step, chosen = results["checkpoint_step"], f"by {results['best_metric']} on these queries"
  if results["selection"] == "best":
    also = ", which is the last one, too" if "also" in results else ""
    return f"best checkpoint (step {step}), chosen {chosen}{also}"
  also = f", which is the best {chosen}, too" if "also" in results else ""
  return f"last checkpoint (step {step}){also}"


def breakdown_protocol(config: ml_collections.ConfigDict) -> str:
  """The protocol for which recalls are broken down: that of eval.best_metric."""
  return config.eval.best_metric.partition("/")[0]


def _recalls(ranks: list[np.ndarray], ks: Sequence[int]) -> dict:
  """Means over splits: {"R@1": percent, ..., "intervals": {"R@1": [low, high], ...}}."""
  each = [ranking.recall_at_k(r, ks) for r in ranks]
  recalls = {f"R@{k}": float(np.mean([e[k] for e in each])) for k in ks}
  return {**recalls, "intervals": {f"R@{k}": list(ranking.recall_interval(ranks, k)) for k in ks}}
