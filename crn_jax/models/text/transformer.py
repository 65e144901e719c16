"""Text transformers of CLIP and SigLIP; equal to transformers' `CLIPTextModel`, `SiglipTextModel`.

CLIP's is causal and pooled where the text ends, so that padding behind it has no effect. SigLIP's
sees all positions, padding included, and is pooled at the last one: it takes full rows only.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from crn_jax.models.layer_norm import LayerNorm
from crn_jax.models.precision import at_least_float32
from crn_jax.models.transformer import Blocks, Sizes

# 'end': at the first end-of-text id. 'largest_id': where the id is largest, as CLIP's first
# configurations, which name a wrong end of text, mean it. 'last': at the last position.
POOLINGS = ("end", "largest_id", "last")

_normal = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class TextTowerConfig(Sizes):
  """Sizes of a text tower.

  Attributes:
    vocab_size: rows of the embedding.
    length: number of positions; longer texts are cut.
    pooling: one of `POOLINGS`.
    end_id: id of the end of a text, if `pooling` is 'end'.
  """

  vocab_size: int
  length: int
  pooling: str
  end_id: int

  @property
  def causal(self) -> bool:
    """Whether a token sees only itself and those before it."""
    return self.pooling != "last"


@flax.struct.dataclass
class TextTokens:
  """What a text tower gives.

  Attributes:
    pooled: [batch, width], before any projection.
    tokens: [batch, length, width], after the closing LayerNorm; what stands at padding means
      nothing.
    layers: [depth, batch, length, width], every block's output, if asked for; else None.
  """

  pooled: jax.Array
  tokens: jax.Array
  layers: jax.Array | None = None


class TextTower(nn.Module):
  """The tower.

  Attributes:
    config: its sizes.
    remat: what blocks keep for their gradient, see `remat`.
    dtype: of the blocks; parameters and what blocks add to are float32 (`precision`).
  """

  config: TextTowerConfig
  remat: str = "none"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array, *, each: bool = False) -> TextTokens:
    """Encodes texts.

    Args:
      ids: [batch, length] int32, as the tower's tokenizer gives them. A causal tower also takes
        shorter rows.
      each: whether every block's output is wanted.

    Raises:
      ValueError: rows of another length.
    """
    c = self.config
    if ids.shape[1] > c.length or (not c.causal and ids.shape[1] != c.length):
      raise ValueError(f"expected rows of {c.length} ids, got {ids.shape[1]}")
    embed = nn.Embed(c.vocab_size, c.width, embedding_init=_normal, name="embedding")
    positions = self.param("position_embedding", _normal, (c.length, c.width))
    x = (embed(ids) + positions[: ids.shape[1]]).astype(at_least_float32(self.dtype))
    x, layers = Blocks(c, c.causal, self.remat, self.dtype, name="encoder")(x, each=each)
    x = LayerNorm(c.epsilon, at_least_float32(self.dtype), name="final_norm")(x)
    return TextTokens(x[jnp.arange(len(ids)), self._pooled_position(ids)], x, layers)

  def _pooled_position(self, ids: jax.Array) -> jax.Array:
    """[batch, length] -> [batch] int."""
    if self.config.pooling == "last":
      return jnp.full(len(ids), ids.shape[1] - 1)
    if self.config.pooling == "largest_id":
      return jnp.argmax(ids, axis=1)
    return jnp.argmax(ids == self.config.end_id, axis=1)
