"""Which queries are shown, and what a picture needs to know of them."""

from collections.abc import Sequence

import ml_collections
import numpy as np

from crn_jax import evaluate
from crn_jax.input_pipeline import images
from crn_jax.input_pipeline.dataset import EvalSplit
from crn_jax.input_pipeline.tokenizers.words import RESERVED, UNK, Vocabulary
from crn_jax.reports.pictures.attention import POSITIONS, WORDS, AttentionRow, Word
from crn_jax.reports.pictures.grid import GridRow
from crn_jax.retrieval import ranking
from crn_jax.retrieval.encode import Encoded

# Words that name nothing in an image. What negates or compares ("no", "more") is content.
STOP_WORDS = frozenset((
  "a", "an", "and", "are", "as", "at", "be", "been", "being", "but", "by", "can", "do", "does",
  "for", "from", "had", "has", "have", "having", "he", "her", "his", "i", "if", "in", "into", "is",
  "it", "its", "me", "my", "of", "on", "or", "our", "rather", "she", "so", "some", "than", "that",
  "the", "their", "them", "then", "there", "these", "they", "this", "those", "to", "want", "wants",
  "was", "we", "were", "which", "while", "with", "would", "you", "your",
))  # fmt: skip
# Parts of the model: what their attention weights sum over, and what they say.
_PARTS = {
  "local": (WORDS, "Which words each position of the image attends to."),
  "global": (POSITIONS, "Which positions of the image each word attends to."),
}
TOP = 10  # Images shown of a ranking; a target among them counts as found.


def spread(rows: Sequence[int], count: int) -> np.ndarray:
  """Up to `count` of the rows, evenly spread from the first to the last."""
  rows = np.asarray(rows, int)
  at = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
  return rows[at]


def found(ranks: np.ndarray, count: int) -> np.ndarray:
  """Queries whose target is among the first `TOP`, evenly over the queries' order.

  Args:
    ranks: [queries] int, 0-based rank of the target.
    count: how many at most.
  """
  return spread(np.flatnonzero(ranks < TOP), count)


def missed(ranks: np.ndarray, count: int) -> np.ndarray:
  """Queries whose target is not among the first `TOP`, evenly from the nearest miss to the worst.

  Args:
    ranks: [queries] int, 0-based rank of the target.
    count: how many at most.
  """
  order = np.argsort(ranks, kind="stable")
  return spread(order[ranks[order] >= TOP], count)


def grid_rows(
  chosen: Sequence[int],
  ranks: np.ndarray,
  encoded: Encoded,
  split: EvalSplit,
  protocol: str,
  config: ml_collections.ConfigDict,
) -> list[GridRow]:
  """Rows of a retrieval grid.

  Args:
    chosen: rows of `split.queries`.
    ranks: [queries] int, 0-based rank of every query's target in the protocol's gallery.
    encoded: vectors of the split.
    split: images and queries.
    protocol: names the gallery.
    config: the whole configuration.
  """
  gallery = split.galleries[protocol]
  labels, target = evaluate.image_labels(split)[gallery], evaluate.target_labels(split)
  in_gallery = np.isin(target, labels)
  exclude = evaluate.excluded_positions(split, protocol, config)[chosen]
  top, scores = ranking.top_k(encoded.composed[chosen], encoded.images[gallery], TOP, exclude)
  rows = []
  for i, query in enumerate(chosen):
    ranked = top[i] != exclude[i]  # Of a gallery smaller than `TOP` all is returned.
    at = np.flatnonzero(labels[top[i][ranked]] == target[query])
    rows.append(
      GridRow(
        reference=split.image_paths[split.queries.reference[query]],
        text=_text(split, query),
        top=tuple(
          (split.image_paths[gallery[g]], float(s))
          for g, s in zip(top[i][ranked], scores[i][ranked], strict=True)
        ),
        target=split.image_paths[split.queries.target[query]],
        target_position=int(at[0]) if len(at) else None,
        rank=int(ranks[query]) if in_gallery[query] else None,
      )
    )
  return rows


def attention_rows(
  chosen: Sequence[int],
  attention: dict[str, np.ndarray],
  ranks: np.ndarray,
  split: EvalSplit,
  protocol: str,
  table: Vocabulary,
  config: ml_collections.ConfigDict,
) -> list[AttentionRow]:
  """Rows of a picture of attention.

  Args:
    chosen: rows of `split.queries`.
    attention: part of the model -> [chosen, max_words, h, w], of `Encoder.attention`.
    ranks: [queries] int, 0-based rank of every query's target in the protocol's gallery.
    split: images and queries.
    protocol: names the gallery.
    table: the run's vocabulary.
    config: the whole configuration.
  """
  data = config.data
  in_gallery = np.isin(
    evaluate.target_labels(split), evaluate.image_labels(split)[split.galleries[protocol]]
  )
  rows = []
  for i, query in enumerate(chosen):
    words = shown_words(split.queries.texts[query], table)
    if not config.model.mask_padding:  # There padding acts like words.
      words += [Word("PAD", "padding")] * (table.max_words - len(words))
    picture = images.decode(split.image_paths[split.queries.reference[query]])
    picture = images.center_crop(images.resize_short_side(picture, data.resize), data.image_size)
    rank = ranks[query]
    outcome = f"target at rank {rank + 1}" if in_gallery[query] else "target not in the gallery"
    rows.append(
      AttentionRow(
        reference=picture,
        text=_text(split, query),
        outcome=f"{'found' if rank < TOP else 'missed'}: {outcome}",
        words=tuple(words),
        attention={part: weights[i, : len(words)] for part, weights in attention.items()},
        sums_over={part: _PARTS[part][0] for part in attention},
        notes={part: _PARTS[part][1] for part in attention},
      )
    )
  return rows


def shown_words(texts: Sequence[str], table: Vocabulary) -> list[Word]:
  """The words of a query as the model reads them: cut, with markers; unknown ones as they stand."""

  def note(word, i):
    if i == UNK:
      return "unknown"
    if i < len(RESERVED):
      return "marker"
    return "stop word" if word in STOP_WORDS else ""

  return [Word(word.strip("<>"), note(word, i)) for word, i in table.read(texts)]


def _text(split: EvalSplit, query: int) -> str:
  return " / ".join(split.queries.texts[query])
