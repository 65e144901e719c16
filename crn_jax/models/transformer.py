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

from crn_jax.models import linear
from crn_jax.models.backbones.remat import rematerialised

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


def dense(features: int, dtype, name: str, use_bias: bool = True) -> nn.Dense:
  """A linear layer; random values are normal with deviation 0.02."""
  return linear.dense(features, _normal, nn.initializers.zeros, dtype, use_bias, name)


def layer_norm(epsilon: float, dtype, name: str) -> nn.LayerNorm:
  """LayerNorm with the two-pass variance, which loses no digits."""
  return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name)


class MLP(nn.Module):
  """Two linear layers with an activation between them."""

  sizes: Sizes
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., width] -> [..., width]."""
    x = dense(self.sizes.mlp_dim, self.dtype, "fc1")(x)
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
    y = layer_norm(sizes.epsilon, self.dtype, "norm1")(x)
    qkv = dense(3 * sizes.width, self.dtype, "qkv")(y)
    # [batch, tokens, 3 width] -> three of [batch, tokens, heads, head width].
    q, k, v = (part.reshape(*part.shape[:2], sizes.heads, -1) for part in jnp.split(qkv, 3, -1))
    y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)  # Logits are float32.
    x = x + dense(sizes.width, self.dtype, "proj")(y.reshape(x.shape))
    return x + MLP(sizes, self.dtype, name="mlp")(layer_norm(sizes.epsilon, self.dtype, "norm2")(x))


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
    # Not `nn.scan`: its initial values come out of a scan over the whole model, which
    # `initial_values` could not take apart.
    block = rematerialised(Block, self.remat, scanned=True)(
      self.sizes, self.causal, self.dtype, parent=None
    )

    def init(key):
      keys = jax.random.split(key, self.sizes.depth)
      return jax.vmap(lambda k: block.init(k, x[:1])["params"])(keys)

    def step(x, params):
      x = block.apply({"params": params}, x)
      return x, x if each else None

    return jax.lax.scan(step, x, self.param("blocks", init))
