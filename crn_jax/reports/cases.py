"""Which queries are shown, and what a picture needs to know of them."""

import dataclasses
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from crn_jax.input_pipeline import images
from crn_jax.input_pipeline.dataset import EvalSplit
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.reports.pictures.attention import AttentionRow, Word
from crn_jax.reports.pictures.grid import GridRow
from crn_jax.retrieval.metrics import UNRANKED

# Words that name nothing in an image. What negates or compares ("no", "more") is content.
STOP_WORDS = frozenset((
  "a", "an", "and", "are", "as", "at", "be", "been", "being", "but", "by", "can", "do", "does",
  "for", "from", "had", "has", "have", "having", "he", "her", "his", "i", "if", "in", "into", "is",
  "it", "its", "me", "my", "of", "on", "or", "our", "rather", "she", "so", "some", "than", "that",
  "the", "their", "them", "then", "there", "these", "they", "this", "those", "to", "want", "wants",
  "was", "we", "were", "which", "while", "with", "would", "you", "your",
))  # fmt: skip
TOP = 10  # Images shown of a ranking; a target among them counts as found.
_ROWS = 8  # Queries of a retrieval grid.
_ATTENDED = 2  # Queries of a picture of attention: so many found and as many missed.


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


@dataclasses.dataclass(frozen=True)
class Cases:
  """Queries of a split that are shown, and what was found for them.

  Attributes:
    split: images and queries.
    protocol: names the gallery.
    ranks: [queries] int, 0-based rank of every query's target in it, or `UNRANKED`.
    groups: "all", "found", "missed" -> rows of `split.queries`, those of the retrieval grids.
    attended: rows of `split.queries`, those of the picture of attention.
    sizing: how the model's pictures are brought to its size.
    top: row of the groups -> (gallery position, score) of its first `TOP` images, best first.
    attention: part of the model -> [attended, words, h, w]; empty if the method has none.
    attention_notes: see `Method`.
  """

  split: EvalSplit
  protocol: str
  ranks: np.ndarray
  groups: Mapping[str, np.ndarray]
  attended: np.ndarray
  sizing: images.Sizing
  top: Mapping[int, Sequence[tuple[int, float]]] = dataclasses.field(default_factory=dict)
  attention: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  attention_notes: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

  @classmethod
  def choose(
    cls, split: EvalSplit, protocol: str, ranks: np.ndarray, sizing: images.Sizing
  ) -> "Cases":
    """Which queries to show; what was found for them is not known yet."""
    groups = {
      "all": spread(np.arange(len(ranks)), _ROWS),
      "found": found(ranks, _ROWS),
      "missed": missed(ranks, _ROWS),
    }
    attended = np.concatenate([found(ranks, _ATTENDED), missed(ranks, _ATTENDED)])
    return cls(split, protocol, ranks, groups, attended, sizing)

  @property
  def chosen(self) -> np.ndarray:
    """Rows of all groups, each once."""
    return np.unique(np.concatenate(list(self.groups.values())))

  def grid_rows(self, group: str) -> list[GridRow]:
    """Rows of a group's retrieval grid."""
    split, gallery = self.split, self.split.galleries[self.protocol]
    labels, target = split.labels[gallery], split.target_labels
    rows = []
    for query in self.groups[group]:
      top = self.top[int(query)]
      hits = [i for i, (position, _) in enumerate(top) if labels[position] == target[query]]
      rows.append(
        GridRow(
          reference=split.image_paths[split.queries.reference[query]],
          text=text(split, query),
          top=tuple((split.image_paths[gallery[position]], score) for position, score in top),
          target=split.image_paths[split.queries.target[query]],
          target_position=hits[0] if hits else None,
          rank=int(self.ranks[query]) if self.ranks[query] != UNRANKED else None,
          also_right=self._also_right(query),
        )
      )
    return rows

  def _also_right(self, query: int) -> tuple[int, ...]:
    """Places in the query's first images of right ones other than its target."""
    split, rows = self.split, self.split.galleries[self.protocol]
    if split.truths is None:
      return ()
    others = set(split.truths[query].tolist()) - {int(split.queries.target[query])}
    top = self.top[int(query)]
    return tuple(i for i, (position, _) in enumerate(top) if int(rows[position]) in others)

  def attention_rows(
    self, table: Tokenizer, config: ml_collections.ConfigDict
  ) -> list[AttentionRow]:
    """Rows of the picture of attention.

    Args:
      table: the run's vocabulary.
      config: the whole configuration.
    """
    split, rows = self.split, []
    for i, query in enumerate(self.attended):
      words = shown_words(split.queries.texts[query], table)
      if not config.model.mask_padding:  # There padding acts like words.
        words += [Word("PAD", "padding")] * (table.max_words - len(words))
      path = split.image_paths[split.queries.reference[query]]
      picture = images.center_crop(images.read(path, self.sizing), self.sizing.image_size)
      rank = self.ranks[query]
      outcome = "target not ranked" if rank == UNRANKED else f"target at rank {rank + 1}"
      rows.append(
        AttentionRow(
          reference=picture,
          text=text(split, query),
          outcome=f"{'found' if rank < TOP else 'missed'}: {outcome}",
          words=tuple(words),
          attention={part: weights[i, : len(words)] for part, weights in self.attention.items()},
          sums_over={part: self.attention_notes[part][0] for part in self.attention},
          notes={part: self.attention_notes[part][1] for part in self.attention},
        )
      )
    return rows


def shown_words(texts: Sequence[str], table: Tokenizer) -> list[Word]:
  """The words of a query as the model reads them: cut, with markers; unknown ones as they stand."""

  def note(word, i):
    return table.role(i) or ("stop word" if word in STOP_WORDS else "")

  return [Word(word.strip("<>") or word, note(word, i)) for word, i in table.read(texts)]


def text(split: EvalSplit, query: int) -> str:
  """The captions of a query in one line."""
  return " / ".join(split.queries.texts[query])
