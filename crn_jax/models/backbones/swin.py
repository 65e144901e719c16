"""Swin Transformer (Liu et al., ICCV 2021) as timm computes it, NHWC.

Equal to timm's `swin_*_patch4_window7_224`: same windows, shifts, masks, initial values and
rounding order, so that converted weights give the same features. Sizes are free.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from crn_jax.errors import UserError
from crn_jax.models import linear, random_keys
from crn_jax.models.backbones import stacking, window_attention
from crn_jax.models.backbones.feature_maps import FeatureMaps
from crn_jax.models.backbones.window_attention import Windows
from crn_jax.models.layer_norm import LayerNorm
from crn_jax.models.precision import at_least_float32, widened
from crn_jax.models.remat import KEPT, rematerialised

# name -> arguments of `SwinTransformer`, as in timm's `<name>_patch4_window7_224`.
VARIANTS = {
  'swin_tiny': {
    'embed_dim': 96, 'depths': (2, 2, 6, 2), 'num_heads': (3, 6, 12, 24)},
  'swin_small': {
    'embed_dim': 96, 'depths': (2, 2, 18, 2), 'num_heads': (3, 6, 12, 24)},
  'swin_base': {
    'embed_dim': 128, 'depths': (2, 2, 18, 2), 'num_heads': (4, 8, 16, 32)},
  'swin_large': {
    'embed_dim': 192, 'depths': (2, 2, 18, 2), 'num_heads': (6, 12, 24, 48)},
}  # fmt: skip

_trunc_normal = nn.initializers.truncated_normal(0.02)


def dense(features: int, dtype, name: str, use_bias: bool = True) -> linear.Dense:
  """A linear layer with timm's initial values (truncated normal 0.02, zero bias)."""
  return linear.Dense(features, _trunc_normal, nn.initializers.zeros, dtype, use_bias, name=name)


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU; this form is about twice as fast on a CPU as `jax.nn.gelu(approximate=False)`."""
  return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def relative_position_index(window: tuple[int, int]) -> np.ndarray:
  """Row of the relative bias table for each pair of positions of a window.

  Args:
    window: (rows, columns).

  Returns:
    [n, n] int array, n = rows * columns: query position x key position.
  """
  rows, cols = (axis.reshape(-1) for axis in np.mgrid[: window[0], : window[1]])
  dy = rows[:, None] - rows[None] + window[0] - 1
  dx = cols[:, None] - cols[None] + window[1] - 1
  return dy * (2 * window[1] - 1) + dx


def shift_mask(
  grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> np.ndarray:
  """Additive attention mask that keeps rolled-in tokens apart from their new neighbours.

  Args:
    grid: (rows, columns), multiples of the window.
    window: (rows, columns).
    shift: (rows, columns) by which the grid was rolled.

  Returns:
    [windows, n, n] float32, 0 within a region and -100 across regions.
  """
  # Without a shift along an axis (s = 0) its bands must not split windows: one band is left.
  bands = [
    np.digitize(np.arange(g), [g - w, g - s]) if s else np.zeros(g, np.int64)
    for g, w, s in zip(grid, window, shift, strict=True)
  ]
  labels = _split_windows((bands[0][:, None] * 3 + bands[1])[None, :, :, None], window)[..., 0]
  return np.where(labels[:, :, None] != labels[:, None, :], -100.0, 0.0).astype(np.float32)


def _split_windows(x, window: tuple[int, int]):
  """[batch, h, w, c] -> [batch * windows, window positions, c]."""
  batch, h, w, c = x.shape
  x = x.reshape(batch, h // window[0], window[0], w // window[1], window[1], c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window[0] * window[1], c)


def _join_windows(x, window: tuple[int, int], grid: tuple[int, int]):
  """Inverse of `_split_windows`: -> [batch, h, w, c]."""
  rows, cols = grid[0] // window[0], grid[1] // window[1]
  x = x.reshape(-1, rows, cols, *window, x.shape[-1])
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *grid, x.shape[-1])


class WindowAttention(nn.Module):
  """Multi-head self-attention inside (shifted) windows, with a relative position bias.

  In bfloat16 on a GPU it is one kernel, where that fits: see `window_attention`.
  """

  num_heads: int
  window_size: int
  shifted: bool
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[batch, h, w, dim] -> the same shape."""
    h, w, dim = x.shape[1:]
    windows = Windows.of_grid((h, w), self.window_size, self.shifted)
    to_qkv, to_out = dense(3 * dim, self.dtype, "qkv"), dense(dim, self.dtype, "proj")
    bias = self._bias(windows)
    if window_attention.chosen(self.dtype, dim // self.num_heads, (h, w), windows):
      qkv = checkpoint_name(to_qkv(x), KEPT)
      qkv = qkv.reshape(-1, h, w, 3, self.num_heads, dim // self.num_heads)
      attended = window_attention.attend(qkv, bias, windows)
      return to_out(checkpoint_name(attended, KEPT).reshape(x.shape))
    (rows, columns), shift = windows.grid, windows.shift
    x = jnp.roll(x, (-shift[0], -shift[1]), (1, 2))
    x = jnp.pad(x, ((0, 0), (0, rows - h), (0, columns - w), (0, 0)))
    qkv = checkpoint_name(to_qkv(_split_windows(x, windows.window)), KEPT)
    x = to_out(checkpoint_name(self._attend(qkv, bias, windows), KEPT))
    x = _join_windows(x, windows.window, windows.grid)
    return jnp.roll(x[:, :h, :w], shift, (1, 2))

  def _attend(self, qkv: jax.Array, bias: jax.Array, windows: Windows) -> jax.Array:
    """[batch * windows, n, 3 * dim] -> [batch * windows, n, dim]."""
    n, width = qkv.shape[1:]
    qkv = qkv.reshape(-1, n, 3, self.num_heads, width // 3 // self.num_heads)
    q, k, v = qkv[:, :, 0] * qkv.shape[-1] ** -0.5, qkv[:, :, 1], qkv[:, :, 2]
    # Of bfloat16 products the sum is kept in float32, as the softmax needs it.
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=at_least_float32(q.dtype))
    logits = logits + bias
    if any(windows.shift):
      mask = shift_mask(windows.grid, windows.window, windows.shift)
      logits = logits.reshape(-1, mask.shape[0], *logits.shape[1:]) + mask[:, None].astype(
        logits.dtype
      )
      logits = logits.reshape(-1, *logits.shape[2:])
    attention = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", attention, v).reshape(-1, n, width // 3)

  def _bias(self, windows: Windows) -> jax.Array:
    """[heads, n, n] float32."""
    rows, columns = windows.window
    table = self.param(
      "relative_position_bias_table",
      _trunc_normal,
      ((2 * rows - 1) * (2 * columns - 1), self.num_heads),
    )
    bias = table[relative_position_index(windows.window).reshape(-1)]
    return bias.reshape(rows * columns, rows * columns, self.num_heads).transpose(2, 0, 1)


class SwinBlock(nn.Module):
  """Two residual units: (shifted) window attention, MLP."""

  num_heads: int
  window_size: int
  shifted: bool
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, factors: jax.Array | None) -> jax.Array:
    """[batch, h, w, dim] -> the same shape.

    Args:
      x: input.
      factors: [2, batch] by which what the two units add is multiplied, or None: by 1.
    """
    attention, mlp = (None, None) if factors is None else factors
    attend = WindowAttention(
      self.num_heads, self.window_size, self.shifted, self.dtype, name="attn"
    )
    x = x + _scaled(attend(LayerNorm(dtype=self.dtype, name="norm1")(x)), attention)
    x = checkpoint_name(x, KEPT)
    y = dense(4 * x.shape[-1], self.dtype, "mlp_fc1")(LayerNorm(dtype=self.dtype, name="norm2")(x))
    y = checkpoint_name(y, KEPT)
    return x + _scaled(dense(x.shape[-1], self.dtype, "mlp_fc2")(gelu(y)), mlp)


def _scaled(x: jax.Array, factor: jax.Array | None) -> jax.Array:
  """[batch, h, w, dim] times [batch], multiplied in the factor's precision."""
  if factor is None:
    return x
  return x.astype(factor.dtype) * factor[:, None, None, None]


def drop_path_rates(last: float, blocks: int) -> np.ndarray:
  """[blocks] stochastic depth of each block: 0 at the first, rising linearly to `last`."""
  return np.linspace(0.0, last, blocks)


class BlockPair(nn.Module):
  """A plain and a shifted block: the body of a scan over a stage's stacked parameters."""

  num_heads: int
  window_size: int
  remat: str
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, factors: jax.Array | None) -> tuple[jax.Array, None]:
    """[batch, h, w, dim], factors [2 blocks, 2, batch] or None -> the same shape, nothing."""
    block = rematerialised(SwinBlock, self.remat, scanned=True)
    for j, name in enumerate(stacking.MEMBERS):
      x = block(self.num_heads, self.window_size, j == 1, self.dtype, name=name)(
        x, None if factors is None else factors[j]
      )
    return x, None


class PatchMerging(nn.Module):
  """Halves the grid: four neighbours are concatenated and projected to twice the width."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[batch, h, w, dim] -> [batch, ceil(h / 2), ceil(w / 2), 2 * dim]."""
    dim = x.shape[-1]
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    x = jnp.concatenate(
      [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], axis=-1
    )
    x = LayerNorm(dtype=self.dtype, name="norm")(x)
    return widened(dense(2 * dim, self.dtype, "reduction", use_bias=False)(x))


class SwinTransformer(nn.Module):
  """The backbone.

  Its parameters may be stacked or not, see `stacking`; it is initialised with one array a block.

  Attributes:
    embed_dim: width of the first stage; it doubles at each merging.
    depths: blocks a stage.
    num_heads: attention heads a stage.
    patch_size: side of a patch in pixels.
    window_size: side of an attention window in tokens.
    drop_path_rate: stochastic depth of the last block, rising linearly from 0.
    remat: what blocks keep for their gradient, see `remat`.
    dtype: of the blocks; parameters and what blocks add to are float32 (`precision`).
    axis_name: mapped axis over which the batch is split, if any.
    uses_batch_statistics: see `registry`.
  """

  embed_dim: int = 96
  depths: Sequence[int] = (2, 2, 6, 2)
  num_heads: Sequence[int] = (3, 6, 12, 24)
  patch_size: int = 4
  window_size: int = 7
  drop_path_rate: float = 0.1
  remat: str = "none"
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None
  uses_batch_statistics: ClassVar[bool] = False

  @property
  def map_dim(self) -> int:
    """Width of the last map."""
    return self.embed_dim * 2 ** (len(self.depths) - 1)

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool, undropped: int = 0) -> FeatureMaps:
    """Encodes images.

    Args:
      images: [batch, height, width, 3], normalised.
      train: whether stochastic depth is on (needs the PRNG stream 'drop_path').
      undropped: number of images, the last ones, that pass without stochastic depth all the same.

    Returns:
      `FeatureMaps`: entry k < last of `stages` is the grid after the patch merging that follows
      stage k, [batch, h/2, w/2, 2 * dim_k]; the last is the last stage's output, of which `map` is
      the final LayerNorm.

    Raises:
      UserError: if height or width is not a multiple of the patch size.
    """
    x = self._embed_patches(images.astype(self.dtype))
    block = rematerialised(SwinBlock, self.remat)
    blocks = [
      block(heads, self.window_size, j % 2 == 1, self.dtype, name=stacking.block_name(i, j))
      for i, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True))
      for j in range(depth)
    ]
    factors = self._drop_path_factors(blocks, len(images), undropped) if train else None
    stages, first = [], 0
    for i, depth in enumerate(self.depths):
      if i > 0:
        x = PatchMerging(self.dtype, name=f"stage{i}_merging")(x)
        stages.append(x)
      own = slice(first, first + depth)
      x = self._stage(i, blocks[own], x, None if factors is None else factors[own])
      first += depth
    last = LayerNorm(dtype=at_least_float32(self.dtype), name="norm")(x)
    return FeatureMaps(last, (*stages, x))

  def _stage(
    self, i: int, blocks: Sequence[SwinBlock], x: jax.Array, factors: jax.Array | None
  ) -> jax.Array:
    """[batch, h, w, dim] through all blocks of a stage; factors [blocks, 2, batch] or None."""
    scanned = 0
    if self.has_variable("params", stacking.pairs_name(i)):
      pairs, scanned = len(blocks) // 2, len(blocks) // 2 * 2
      scan = nn.scan(BlockPair, {"params": 0}, length=pairs)
      of_pairs = None
      if factors is not None:
        of_pairs = factors[:scanned].reshape(pairs, 2, *factors.shape[1:])
      pair = scan(
        self.num_heads[i], self.window_size, self.remat, self.dtype, name=stacking.pairs_name(i)
      )
      x, _ = pair(x, of_pairs)
    for j in range(scanned, len(blocks)):
      x = blocks[j](x, None if factors is None else factors[j])
    return x

  def _drop_path_factors(
    self, blocks: Sequence[SwinBlock], batch: int, undropped: int
  ) -> jax.Array | None:
    """[blocks, 2, batch]: 0 where a unit is dropped, else 1 / keep; None if none ever is.

    Drawn for the global batch, so that the number of devices does not matter.
    """
    if self.drop_path_rate == 0.0:
      return None
    keep = 1.0 - drop_path_rates(self.drop_path_rate, len(blocks))
    dropped = batch - undropped
    shards = jax.lax.axis_size(self.axis_name) if self.axis_name else 1

    # Two keys a block, its own by its name.
    keys = random_keys.of_children(self, "drop_path", [block.name for block in blocks], draws=2)
    kept = jax.vmap(lambda key, p: jax.random.bernoulli(key, p, (dropped * shards,)))(
      keys, np.repeat(keep, 2)
    ).reshape(len(blocks), 2, -1)
    if self.axis_name:
      start = jax.lax.axis_index(self.axis_name) * dropped
      kept = jax.lax.dynamic_slice_in_dim(kept, start, dropped, axis=2)
    # In float32 at least: 1 / keep has more digits than bfloat16.
    factors = kept.astype(at_least_float32(self.dtype)) / keep[:, None, None]
    return jnp.pad(factors, ((0, 0), (0, 0), (0, undropped)), constant_values=1.0)

  def _embed_patches(self, images: jax.Array) -> jax.Array:
    """A strided convolution, written as a matrix product: three times as fast on a CPU."""
    batch, height, width, channels = images.shape
    p = self.patch_size
    if height % p or width % p:
      raise UserError(f"images are {height} x {width}: not a multiple of the patch size {p}")
    x = images.reshape(batch, height // p, p, width // p, p, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // p, width // p, -1)
    # Random biases, unlike timm's other layers: they also keep LayerNorm finite on a zero image.
    x = linear.torch_dense(x.shape[-1], self.embed_dim, self.dtype, name="patch_embed")(x)
    return LayerNorm(dtype=at_least_float32(self.dtype), name="patch_norm")(x)
