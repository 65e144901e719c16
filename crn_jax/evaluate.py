"""Evaluation: metrics in every protocol of a data set, per kind of query and kind of text."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import ml_collections
import numpy as np

from crn_jax import processes
from crn_jax.input_pipeline.dataset import Dataset, EvalSplit
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.reports.cases import TOP, Cases
from crn_jax.reports.results import QUERY_KINDS, Recalls, Results, Summary
from crn_jax.retrieval import metrics, ranking
from crn_jax.retrieval.encode import Encoded, Encoder, picture_sizing
from crn_jax.retrieval.metrics import Outcome

# split name -> protocol -> kind of query -> what its queries found.
Outcomes = dict[str, dict[str, dict[str, Outcome]]]

# Bytes of what is added to the products of vectors, of the queries that are ranked at a time.
_ADDED_BYTES = 2**28

# `EvalSplit.ranks_reference` as results have it.
_REFERENCE = {None: None, False: "excluded", True: "kept"}


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What an evaluation found.

  Attributes:
    results: as written to eval.json, see docs/evaluation.md.
    encoded: split name -> its vectors.
    outcomes: of all queries; kinds of query other than "composed" only in the breakdown protocol.
  """

  results: Results
  encoded: dict[str, Encoded]
  outcomes: Outcomes


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
  outcomes = {s.name: find(encoded[s.name], s, config) for s in dataset.evals}
  several = dataset.evals if len(dataset.evals) > 1 else ()
  results = Results(
    dataset=dataset.name,
    checkpoint_step=int(checkpoint_step),
    selection=selection,
    captions=caption_use(dataset.evals, config),
    exclude_reference=config.eval.exclude_reference,
    best_metric=config.eval.best_metric,
    breakdown_protocol=breakdown_protocol(config),
    summary=summarize(dataset.evals, outcomes, config),
    categories={s.name: summarize([s], outcomes, config) for s in several},
    ceilings=dataset.ceilings,
    skipped=dataset.skipped,
  )
  return Evaluation(results, encoded, outcomes)


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
  ranks = evaluation.outcomes[split.name][protocol]["composed"].ranks
  shown = Cases.choose(split, protocol, ranks, picture_sizing(encoder.method))
  # Processes look together: even if their devices rank otherwise, they must agree on where.
  rows = {"attended": shown.attended, **shown.groups}
  agreed = processes.on_primary(lambda: {name: r.tolist() for name, r in rows.items()})
  attended, *groups = (np.asarray(agreed[name], int) for name in rows)
  shown = dataclasses.replace(
    shown, attended=attended, groups=dict(zip(shown.groups, groups, strict=True))
  )
  exclude = excluded_positions(split, protocol, config)[shown.chosen]
  gallery = split.galleries[protocol]
  added = encoded.added.get("composed")
  added = added and of_gallery(added(shown.chosen), gallery, axis=1)
  positions, scores = ranking.top_k(
    encoded.composed[shown.chosen], of_gallery(encoded.images, gallery), TOP, exclude, added=added
  )
  top = {
    int(query): [
      (int(position), float(score))
      for position, score in zip(positions[i], scores[i], strict=True)
      if position != exclude[i]  # Of a gallery smaller than `TOP` all is returned.
    ]
    for i, query in enumerate(shown.chosen)
  }
  attention = encoder.attention(variables, split, attended, vocabulary)
  return dataclasses.replace(
    shown,
    top=top,
    attention=attention,
    attention_notes=encoder.method.attention_notes,
  )


def caption_use(splits: Sequence[EvalSplit], config: ml_collections.ConfigDict) -> str:
  """How the captions of a query are used, for the record: "single" if there is nothing to join."""
  single = all(len(text) == 1 for s in splits for text in s.queries.texts)
  return "single" if single and config.data.captions == "joined" else config.data.captions


def find(
  encoded: Encoded, split: EvalSplit, config: ml_collections.ConfigDict
) -> dict[str, dict[str, Outcome]]:
  """What one split's queries find: protocol -> kind of query -> `Outcome`."""
  queries = (encoded.composed, encoded.images[split.queries.reference], encoded.text_only)
  found = {protocol: {} for protocol in split.galleries}
  for kind, vectors in zip(QUERY_KINDS, queries, strict=True):
    parts = {p: [] for p in found if kind == "composed" or p == breakdown_protocol(config)}
    for rows, added in _pieces(encoded.added.get(kind), len(vectors), len(encoded.images)):
      for protocol, outcomes in parts.items():
        outcomes.append(_find_piece(vectors, rows, added, encoded, split, protocol, config))
    for protocol, outcomes in parts.items():
      found[protocol][kind] = Outcome.joined(outcomes)
  return found


def summarize(
  splits: Sequence[EvalSplit], outcomes: Outcomes, config: ml_collections.ConfigDict
) -> Summary:
  """Metrics in percent: by protocol, by kind of query, by kind of text.

  The last two are given for the protocol of eval.best_metric. Over several splits (categories)
  metrics are means, as FashionIQ averages, and counts are sums.

  Args:
    splits: one or more, with the same protocols.
    outcomes: of these splits at least.
    config: the whole configuration.
  """
  chosen = breakdown_protocol(config)
  measured = metrics.names(
    config.eval.recall_at,
    subsets=all(s.subsets is not None for s in splits),
    truths=all(s.truths is not None for s in splits),
  )

  def recalls(parts, **facts):
    return Recalls(*metrics.measure(list(parts), measured), **facts)

  by_text_kind = None
  if all(s.queries.kinds for s in splits):
    by_text_kind = {}
    for kind in sorted({kind for s in splits for kind in s.queries.kinds}):
      parts = [
        outcomes[s.name][chosen]["composed"].of(np.asarray(s.queries.kinds) == kind) for s in splits
      ]
      parts = [part for part in parts if len(part)]
      by_text_kind[kind] = recalls(parts, counts={"n_queries": sum(map(len, parts))})
  return Summary(
    n_queries=sum(len(s.queries) for s in splits),
    protocols={
      protocol: recalls(
        (outcomes[s.name][protocol]["composed"] for s in splits),
        counts={"gallery": sum(len(s.galleries[protocol]) for s in splits)},
        reference=_REFERENCE[splits[0].ranks_reference.get(protocol)],
      )
      for protocol in splits[0].galleries
    },
    by_query={k: recalls(outcomes[s.name][chosen][k] for s in splits) for k in QUERY_KINDS},
    by_text_kind=by_text_kind,
  )


def of_gallery(values: np.ndarray, gallery: np.ndarray, axis: int = 0) -> np.ndarray:
  """Values of a gallery's images; no copy where it is all images in their order.

  Args:
    values: of all images of the split, along an axis.
    gallery: [g] rows of the split's images.
    axis: that of the images.
  """
  n = values.shape[axis]
  return values if np.array_equal(gallery, np.arange(n)) else np.take(values, gallery, axis)


def excluded_positions(
  split: EvalSplit, protocol: str, config: ml_collections.ConfigDict
) -> np.ndarray:
  """[queries] gallery position that a query does not rank (its own reference), or -1."""
  if split.excludes_reference(protocol, config.eval.exclude_reference):
    return split.reference_positions(protocol)
  return np.full(len(split.queries), -1)


def _pieces(
  added: Callable[[np.ndarray], np.ndarray] | None, n_queries: int, n_images: int
) -> Iterator[tuple[slice, np.ndarray | None]]:
  """Queries, so few at a time that what is added to their products needs little memory.

  Yields:
    Rows of the queries; [rows, images] what is added, None if that is nothing.
  """
  if added is None:
    yield slice(n_queries), None
    return
  blocks = max(1, _ADDED_BYTES // (4 * n_images * ranking.BLOCK_SIZE))
  step = blocks * ranking.BLOCK_SIZE
  for start in range(0, max(n_queries, 1), step):
    rows = np.arange(start, min(start + step, n_queries))
    yield slice(start, start + len(rows)), added(rows)


def _find_piece(
  vectors: np.ndarray,
  rows: slice,
  added: np.ndarray | None,
  encoded: Encoded,
  split: EvalSplit,
  protocol: str,
  config: ml_collections.ConfigDict,
) -> Outcome:
  """What some of the queries, given by the vectors of all, find in a protocol's gallery."""
  images = split.galleries[protocol]
  queries, gallery = vectors[rows], of_gallery(encoded.images, images)
  exclude = excluded_positions(split, protocol, config)[rows]
  in_gallery = None if added is None else of_gallery(added, images, axis=1)
  ranks = ranking.target_ranks(
    queries,
    gallery,
    split.target_labels[rows],
    exclude,
    labels=split.labels[images],
    added=in_gallery,
  )
  subset_ranks = hits = n_truths = None
  if split.subsets is not None:
    order = ranking.subset_order(queries, encoded.images, split.subsets[rows], added)
    is_target = order == split.queries.target[rows, None]
    subset_ranks = np.where(is_target.any(axis=1), is_target.argmax(axis=1), metrics.UNRANKED)
  if split.truths is not None:
    truths = split.truths[rows]
    best, _ = ranking.top_k(
      queries, gallery, max(metrics.PRECISION_CUTS), exclude, added=in_gallery
    )
    hits = (images[best][:, :, None] == truths[:, None, :]).any(axis=2)
    n_truths = (truths >= 0).sum(axis=1)
  return Outcome(ranks, subset_ranks, hits, n_truths)


def breakdown_protocol(config: ml_collections.ConfigDict) -> str:
  """The protocol for which recalls are broken down: that of eval.best_metric."""
  return config.eval.best_metric.partition("/")[0]
