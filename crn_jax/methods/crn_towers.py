"""CRN's composition on pretrained towers (CLIP, SigLIP): its losses, update and joined vector."""

import dataclasses
from typing import ClassVar

import ml_collections

from crn_jax.methods.crn import CRN
from crn_jax.methods.encoder import EncoderMethod
from crn_jax.models.crn import BRANCHES, Branch
from crn_jax.models.crn_towers import TowerBranch


@dataclasses.dataclass(frozen=True)
class CRNTowers(CRN, EncoderMethod):
  """As `CRN`, each branch with a pair of towers in the place of its backbone and its LSTM."""

  pretrained: ClassVar[str] = "encoder"

  def __post_init__(self):
    CRN.__post_init__(self)
    EncoderMethod.__post_init__(self)

  @property
  def branches(self) -> dict[str, Branch]:
    model = ml_collections.FrozenConfigDict(self.config.model)
    return {
      kind: TowerBranch(kind, model, self.vocab_size, self.axis_name, self.encoder_config)
      for kind in BRANCHES
    }

  def unused_parameters(self) -> frozenset[str]:
    """What makes the towers' own vectors is left alone, too."""
    unused = {"image_projection", "text_projection", "pool"}
    if self.encoder_config.image.class_tokens:
      unused.add("post_norm")
    return CRN.unused_parameters(self) | unused
