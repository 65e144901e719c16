"""Evaluation: Recall@K in every protocol of a data set, per kind of query and kind of text."""

import dataclasses
from collections.abc import Sequence

import ml_collections
import numpy as np

from crn_jax.input_pipeline.dataset import Dataset, EvalSplit
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.reports.cases import TOP, Cases
from crn_jax.reports.results import QUERY_KINDS, Recalls, Results, Summary
from crn_jax.retrieval import metrics, ranking
from crn_jax.retrieval.encode import Encoded, Encoder

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

  results: Results
  encoded: dict[str, Encoded]
  ranks: Ranks


def evaluate(
  encoder: Encoder,
  variables,
  dataset: Dataset,
  vocabulary: Tokenizer,
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
    selection: how the checkpoint was chosen, see `Results`, for the record.
  """
  config = encoder.method.config
  encoded = {s.name: encoder.encode(variables, s, vocabulary) for s in dataset.evals}
  ranks = {s.name: split_ranks(encoded[s.name], s, config) for s in dataset.evals}
  several = dataset.evals if len(dataset.evals) > 1 else ()
  results = Results(
    dataset=dataset.name,
    checkpoint_step=int(checkpoint_step),
    selection=selection,
    captions=caption_use(dataset.evals, config),
    exclude_reference=config.eval.exclude_reference,
    best_metric=config.eval.best_metric,
    breakdown_protocol=breakdown_protocol(config),
    summary=summarize(dataset.evals, ranks, config),
    categories={s.name: summarize([s], ranks, config) for s in several},
    ceilings=dataset.ceilings,
    skipped=dataset.skipped,
  )
  return Evaluation(results, encoded, ranks)


def cases(
  encoder: Encoder, variables, vocabulary: Tokenizer, split: EvalSplit, evaluation: Evaluation
) -> Cases:
  """What is shown of a split's queries: their first images, and where the model looks.

  Args:
    encoder: compiled encoders.
    variables: those evaluated, placed by the encoder's `parallel.replicate`.
    vocabulary: of the run.
    split: one that was evaluated.
    evaluation: what was found.
  """
  config = encoder.method.config
  protocol, encoded = breakdown_protocol(config), evaluation.encoded[split.name]
  shown = Cases.choose(split, protocol, evaluation.ranks[split.name][protocol]["composed"])
  exclude = excluded_positions(split, protocol, config)[shown.chosen]
  gallery = gallery_vectors(encoded, split.galleries[protocol])
  positions, scores = ranking.top_k(encoded.composed[shown.chosen], gallery, TOP, exclude)
  top = {
    int(query): [
      (int(position), float(score))
      for position, score in zip(positions[i], scores[i], strict=True)
      if position != exclude[i]  # Of a gallery smaller than `TOP` all is returned.
    ]
    for i, query in enumerate(shown.chosen)
  }
  attention = encoder.attention(variables, split, shown.attended, vocabulary)
  return dataclasses.replace(
    shown,
    top=top,
    attention=attention,
    attention_notes=encoder.method.attention_notes,
    interpolation=encoder.method.preprocessing.interpolation,
  )


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


def summarize(
  splits: Sequence[EvalSplit], ranks: Ranks, config: ml_collections.ConfigDict
) -> Summary:
  """Recalls in percent: by protocol, by kind of query, by kind of text.

  The last two are given for the protocol of eval.best_metric. Over several splits (categories)
  recalls are means, as FashionIQ averages, and counts are sums.

  Args:
    splits: one or more, with the same protocols.
    ranks: of these splits at least.
    config: the whole configuration.
  """
  chosen = breakdown_protocol(config)

  def recalls(rows, **counts):
    return _recalls(list(rows), config.eval.recall_at, counts)

  by_text_kind = None
  if all(s.queries.kinds for s in splits):
    by_text_kind = {}
    for kind in sorted({kind for s in splits for kind in s.queries.kinds}):
      rows = [
        ranks[s.name][chosen]["composed"][np.asarray(s.queries.kinds) == kind] for s in splits
      ]
      rows = [r for r in rows if len(r)]
      by_text_kind[kind] = recalls(rows, n_queries=sum(map(len, rows)))
  return Summary(
    n_queries=sum(len(s.queries) for s in splits),
    protocols={
      protocol: recalls(
        (ranks[s.name][protocol]["composed"] for s in splits),
        gallery=sum(len(s.galleries[protocol]) for s in splits),
      )
      for protocol in splits[0].galleries
    },
    by_query={k: recalls(ranks[s.name][chosen][k] for s in splits) for k in QUERY_KINDS},
    by_text_kind=by_text_kind,
  )


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
  return split.reference_positions(protocol)


def query_ranks(
  queries: np.ndarray,
  encoded: Encoded,
  split: EvalSplit,
  protocol: str,
  config: ml_collections.ConfigDict,
) -> np.ndarray:
  """[queries] int, 0-based rank of each query's target in a protocol's gallery."""
  gallery = split.galleries[protocol]
  return ranking.target_ranks(
    queries,
    gallery_vectors(encoded, gallery),
    split.target_labels,
    excluded_positions(split, protocol, config),
    labels=split.labels[gallery],
  )


def breakdown_protocol(config: ml_collections.ConfigDict) -> str:
  """The protocol for which recalls are broken down: that of eval.best_metric."""
  return config.eval.best_metric.partition("/")[0]


def _recalls(ranks: list[np.ndarray], ks: Sequence[int], counts: dict[str, int]) -> Recalls:
  """Means over splits."""
  each = [metrics.recall_at_k(r, ks) for r in ranks]
  return Recalls(
    {f"R@{k}": float(np.mean([e[k] for e in each])) for k in ks},
    {f"R@{k}": metrics.recall_interval(ranks, k) for k in ks},
    counts,
  )
