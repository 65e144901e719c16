"""The captions of a triplet as one sentence, for text towers that know no marker between them.

As CLIP4Cir uses FashionIQ: it is asked with "A and b", and trained with "a and b", "b and a", a or
b, drawn anew for every triplet in every epoch.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from crn_jax.input_pipeline.dataset import TRIPLETS, Triplets

# Around a caption, where another one may follow.
_STRIPPED = " .,?!"


def join(captions: Sequence[str]) -> str:
  """'a and b' of any number of captions, without the marks at their ends."""
  return " and ".join(caption.strip(_STRIPPED) for caption in captions)


def query(captions: Sequence[str]) -> str:
  """'A and b': as `join`, with a capital."""
  sentence = join(captions)
  return sentence[:1].upper() + sentence[1:]


def variants(captions: Sequence[str]) -> tuple[str, ...]:
  """The sentences of which one is drawn, each as likely: both orders, then each caption alone.

  A single caption has one.
  """
  if len(captions) == 1:
    return (join(captions),)
  return (join(captions), join(captions[::-1]), *(join([caption]) for caption in captions))


@dataclasses.dataclass(frozen=True, eq=False)
class DrawnSentences:
  """A `TripletSource`: fixed triplets, the sentence of each drawn in every epoch.

  Attributes:
    triplets: the triplets, with all captions of each.
  """

  triplets: Triplets

  def __len__(self) -> int:
    return len(self.triplets)

  @functools.cached_property
  def _variants(self) -> tuple[tuple[str, ...], ...]:
    return tuple(map(variants, self.triplets.texts))

  def draw(self, seed: int, epoch: int) -> Triplets:
    """See `TripletSource`; a triplet's draw depends on its place among them alone."""
    draws = np.random.default_rng([seed, epoch, TRIPLETS]).random(len(self))
    texts = tuple(
      (options[int(draw * len(options))],)
      for options, draw in zip(self._variants, draws, strict=True)
    )
    return dataclasses.replace(self.triplets, texts=texts)
