"""Pre-norm transformer blocks, as in the towers of CLIP and SigLIP: equal ones, scanned.

Their parameters are always stacked: every array has an axis [blocks] before its own, and the
program of a tower has one block, whatever its depth.
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from crn_jax.models import linear
from crn_jax.models.layer_norm import LayerNorm
from crn_jax.models.remat import KEPT, rematerialised

# `hidden_act` of Hugging Face's config.json -> function. The cosine of two towers that differ in
# this alone is 0.9999, so that a wrong one is not seen in retrieval.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5))),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}

_normal = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a stack of blocks.

  Attributes:
    width: of a token.
    depth: number of blocks.
    heads: attention heads; divide the width.
    mlp_dim: hidden width of the MLP.
    activation: of the MLP, a key of `ACTIVATIONS`.
    epsilon: of every LayerNorm.
  """

  width: int
  depth: int
  heads: int
  mlp_dim: int
  activation: str
  epsilon: float


def dense(features: int, dtype, name: str, use_bias: bool = True) -> linear.Dense:
  """A linear layer; random values are normal with deviation 0.02."""
  return linear.Dense(features, _normal, nn.initializers.zeros, dtype, use_bias, name=name)


class MLP(nn.Module):
  """Two linear layers with an activation between them."""

  sizes: Sizes
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., width] -> [..., width]."""
    x = checkpoint_name(dense(self.sizes.mlp_dim, self.dtype, "fc1")(x), KEPT)
    return dense(self.sizes.width, self.dtype, "fc2")(ACTIVATIONS[self.sizes.activation](x))


class Block(nn.Module):
  """Self-attention and MLP, each after a LayerNorm and beside a shortcut."""

  sizes: Sizes
  causal: bool
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[batch, tokens, width] -> [batch, tokens, width]."""
    sizes = self.sizes
    y = LayerNorm(sizes.epsilon, self.dtype, name="norm1")(x)
    qkv = checkpoint_name(dense(3 * sizes.width, self.dtype, "qkv")(y), KEPT)
    # [batch, tokens, 3 width] -> three of [batch, tokens, heads, head width].
    q, k, v = (part.reshape(*part.shape[:2], sizes.heads, -1) for part in jnp.split(qkv, 3, -1))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)  # Logits are float32.
    y = checkpoint_name(y.reshape(x.shape), KEPT)
    x = checkpoint_name(x + dense(sizes.width, self.dtype, "proj")(y), KEPT)
    y = LayerNorm(sizes.epsilon, self.dtype, name="norm2")(x)
    return x + MLP(sizes, self.dtype, name="mlp")(y)


class Blocks(nn.Module):
  """`Sizes.depth` blocks, one after another.

  Attributes:
    sizes: of the blocks.
    causal: whether a token sees only itself and those before it.
    remat: what blocks keep for their gradient, see `remat`.
    dtype: of the computation; parameters are float32.
  """

  sizes: Sizes
  causal: bool
  remat: str = "none"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, *, each: bool = False) -> tuple[jax.Array, jax.Array | None]:
    """Passes tokens through all blocks.

    Args:
      x: [batch, tokens, width].
      each: whether every block's output is wanted.

    Returns:
      [batch, tokens, width], and [depth, batch, tokens, width] of every block or None.
    """
    sizes = self.sizes, self.causal, self.dtype
    block = rematerialised(Block, self.remat, scanned=True)(*sizes, parent=None)

    # Not by `nn.scan`, nor of rematerialised blocks: `initial_values` could not take them apart.
    def init(key):
      keys = jax.random.split(key, self.sizes.depth)
      return jax.vmap(lambda k: Block(*sizes, parent=None).init(k, x[:1])["params"])(keys)

    def step(x, params):
      x = block.apply({"params": params}, x)
      return x, x if each else None

    return jax.lax.scan(step, x, self.param("blocks", init))
