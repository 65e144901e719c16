"""Vision transformers of CLIP (Radford et al., 2021) and SigLIP (Zhai et al., 2023).

Equal to transformers' `CLIPVisionModel` and `SiglipVisionModel`. CLIP has a class token, which is
its pooled vector, a LayerNorm before the blocks, and patches without a bias; SigLIP, whose second
version has the same tower, pools the tokens by attention.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from crn_jax.errors import UserError
from crn_jax.models.layer_norm import LayerNorm
from crn_jax.models.precision import at_least_float32
from crn_jax.models.transformer import MLP, Blocks, Sizes, dense

POOLINGS = ("class_token", "attention")
POSITIONS = "position_embedding"

_normal = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class ImageTowerConfig(Sizes):
  """Sizes of an image tower.

  Attributes:
    patch_size: side of a patch in pixels.
    image_size: side of an image in pixels; pixels beyond the last whole patch are not looked at.
    pooling: 'class_token' (CLIP) or 'attention' (SigLIP).
  """

  patch_size: int
  image_size: int
  pooling: str

  @property
  def grid(self) -> int:
    """Patches along a side."""
    return self.image_size // self.patch_size

  @property
  def class_tokens(self) -> int:
    """Tokens before those of the patches, 0 or 1."""
    return int(self.pooling == "class_token")


@flax.struct.dataclass
class ImageTokens:
  """What an image tower gives.

  Attributes:
    pooled: [batch, width], before any projection.
    map: [batch, grid, grid, width], tokens of the patches as the last layer of the tower leaves
      them: of CLIP without, of SigLIP with the closing LayerNorm.
    layers: [depth, batch, tokens, width], every block's output, if asked for; else None.
  """

  pooled: jax.Array
  map: jax.Array
  layers: jax.Array | None = None


class ImageTower(nn.Module):
  """The tower.

  Attributes:
    config: its sizes.
    remat: what blocks keep for their gradient, see `remat`.
    dtype: of the blocks; parameters and what blocks add to are float32 (`precision`).
  """

  config: ImageTowerConfig
  remat: str = "none"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array, *, each: bool = False) -> ImageTokens:
    """Encodes images.

    Args:
      images: [batch, image_size, image_size, 3], normalised.
      each: whether every block's output is wanted.

    Raises:
      UserError: if the images are of another size.
    """
    c, wide = self.config, at_least_float32(self.dtype)
    batch, side = len(images), c.image_size
    if images.shape[1:3] != (side, side):
      raise UserError(
        f"images are {images.shape[1]} x {images.shape[2]}, this tower takes {side} x {side}: set "
        f"data.image_size"
      )
    x = self._embed_patches(images.astype(self.dtype)).astype(wide)
    if c.class_tokens:
      token = self.param("class_embedding", _normal, (c.width,))
      token = jnp.broadcast_to(token, (batch, 1, c.width)).astype(wide)
      x = jnp.concatenate([token, x], axis=1)
    positions = self.param(POSITIONS, _normal, (x.shape[1], c.width))
    x = x + positions.astype(wide)
    if c.class_tokens:
      x = LayerNorm(c.epsilon, wide, name="pre_norm")(x)
    x, layers = Blocks(c, False, self.remat, self.dtype, name="encoder")(x, each=each)
    close = LayerNorm(c.epsilon, wide, name="post_norm")
    if c.pooling == "class_token":
      pooled, x = close(x[:, 0]), x[:, 1:]
    else:
      x = close(x)
      pooled = AttentionPool(c, wide, name="pool")(x)
    return ImageTokens(pooled, x.reshape(batch, c.grid, c.grid, c.width), layers)

  def _embed_patches(self, images: jax.Array) -> jax.Array:
    """[batch, side, side, 3] -> [batch, grid^2, width]: a strided convolution as a product."""
    c, grid = self.config, self.config.grid
    whole = grid * c.patch_size
    x = images[:, :whole, :whole].reshape(len(images), grid, c.patch_size, grid, c.patch_size, 3)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), grid * grid, -1)
    return dense(c.width, self.dtype, "patch_embed", use_bias=c.pooling != "class_token")(x)


class AttentionPool(nn.Module):
  """SigLIP's pooling: a trained query attends to all tokens, then an MLP beside a shortcut."""

  sizes: Sizes
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[batch, tokens, width] -> [batch, width]."""
    batch, tokens, width = x.shape
    heads = self.sizes.heads
    probe = self.param("probe", _normal, (1, 1, width)).astype(self.dtype)
    q = dense(width, self.dtype, "query")(probe).reshape(1, 1, heads, -1)
    kv = dense(2 * width, self.dtype, "key_value")(x).reshape(batch, tokens, 2, heads, -1)
    q = jnp.broadcast_to(q, (batch, *q.shape[1:]))
    y = jax.nn.dot_product_attention(q, kv[:, :, 0], kv[:, :, 1]).reshape(batch, width)
    y = dense(width, self.dtype, "proj")(y)
    return y + MLP(self.sizes, self.dtype, name="mlp")(
      LayerNorm(self.sizes.epsilon, self.dtype, name="norm")(y)
    )
