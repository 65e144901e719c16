"""Swin's attention inside windows as one kernel for GPUs, forward and backward (Pallas, Triton).

XLA's program of it rolls the grid, splits it into windows, transposes queries, keys and values, and
keeps logits and attention for the gradient: many passes over memory for little arithmetic. The
kernel reads a window's rows where they lie, shifted or not, and keeps 64 x 64 logits on the chip;
the gradient computes them again. `SwinTransformer` takes it for bfloat16 on a GPU; otherwise, and
in tests as the reference, it is computed by `swin.WindowAttention`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from crn_jax import platforms

try:
  from jax.experimental.pallas import triton
except ImportError:  # JAX 0.11 announces its end: then attention is computed plainly.
  triton = None

# About so many programs keep a large GPU busy; the gradient of the bias has a partial sum of each.
_PROGRAMS = 1024
_MASKED = -1e30  # Of positions that only fill up a block: their attention is exactly zero.


@dataclasses.dataclass(frozen=True)
class Windows:
  """Where the windows of a grid lie.

  Attributes:
    grid: (rows, columns), multiples of the window.
    window: (rows, columns).
    shift: (rows, columns) by which windows are shifted, cyclically.
  """

  grid: tuple[int, int]
  window: tuple[int, int]
  shift: tuple[int, int]

  @classmethod
  def of_grid(cls, grid: tuple[int, int], size: int, shifted: bool) -> "Windows":
    """Windows of `size` x `size`, shifted by half of it, over a grid filled up to hold them whole.

    Along an axis that one window covers there is no shift.
    """
    window = tuple(min(size, side) for side in grid)
    shift = tuple(size // 2 if shifted and side > size else 0 for side in grid)
    whole = tuple(-(-side // part) * part for side, part in zip(grid, window, strict=True))
    return cls(whole, window, shift)

  @property
  def positions(self) -> int:
    """Of a window."""
    return self.window[0] * self.window[1]

  @property
  def per_image(self) -> int:
    """Windows of an image."""
    return (self.grid[0] // self.window[0]) * (self.grid[1] // self.window[1])

  @property
  def block(self) -> int:
    """Positions of a window filled up to what the kernel multiplies."""
    return max(16, 1 << (self.positions - 1).bit_length())

  def place(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A window by its number, over all images: of each position of its block its token, whether it
    is one, and its region: tokens of different ones are no neighbours."""
    image, number = number // self.per_image, number % self.per_image
    i = jnp.arange(self.block)
    per_row = self.grid[1] // self.window[1]
    row = number // per_row * self.window[0] + i // self.window[1]
    column = number % per_row * self.window[1] + i % self.window[1]
    region = self._band(row, 0) * 3 + self._band(column, 1)
    row, column = (row + self.shift[0]) % self.grid[0], (column + self.shift[1]) % self.grid[1]
    token = (image * self.grid[0] + row) * self.grid[1] + column
    inside = i < self.positions
    return token, inside, region

  def _band(self, at: jax.Array, axis: int) -> jax.Array:
    size, window, shift = self.grid[axis], self.window[axis], self.shift[axis]
    if not shift:
      return jnp.zeros_like(at)
    return (at >= size - window).astype(jnp.int32) + (at >= size - shift).astype(jnp.int32)


def chosen(dtype, head_dim: int, grid: tuple[int, int], windows: Windows) -> bool:
  """Whether attention is computed by this kernel: for bfloat16 on a GPU, if it fits.

  It has heads of a power of two, windows that the chip holds, and a grid that is not filled up.
  """
  return (
    triton is not None
    and dtype == jnp.bfloat16
    and platforms.current() == "gpu"
    and head_dim >= 16
    and head_dim & (head_dim - 1) == 0
    and windows.positions <= 64
    and windows.grid == grid
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend(qkv: jax.Array, bias: jax.Array, windows: Windows, interpret: bool = False) -> jax.Array:
  """Attention of every position to those of its window.

  Args:
    qkv: [batch, h, w, 3, heads, head_dim]; queries are not scaled yet.
    bias: [heads, n, n] float32, added to the logits; n positions of a window.
    windows: of the grid h x w.
    interpret: run without a GPU, slowly.

  Returns:
    [batch, h, w, heads, head_dim] in qkv's dtype.
  """
  return _forward(qkv, bias, windows, interpret)


def _forward(qkv, bias, windows, interpret):
  tokens, heads, dim = _flat(qkv)

  def kernel(qkv_ref, bias_ref, out_ref):
    head = pl.program_id(1)
    place = windows.place(pl.program_id(0))
    q, k, v = (_read(qkv_ref, place, i * heads + head) for i in range(3))
    attention = _attention(q, k, bias_ref[0], place, windows)
    out = _product(attention.astype(v.dtype), v, (1, 0))
    _write(out_ref, place, head, out)

  out = _call(
    kernel, "window_attention", grid=(_count(qkv, windows), heads),
    in_specs=[_whole(), _bias_spec(windows, lambda window, head: (head, 0, 0))],
    out_specs=_whole(), out_shape=jax.ShapeDtypeStruct((tokens, heads, dim), qkv.dtype),
    interpret=interpret,
  )(qkv.reshape(tokens, 3 * heads, dim), _padded(bias, windows))  # fmt: skip
  return out.reshape(*qkv.shape[:3], heads, dim)


def _forward_for_gradient(qkv, bias, windows, interpret):
  return _forward(qkv, bias, windows, interpret), (qkv, bias)


def _backward(windows, interpret, saved, of_out):
  qkv, bias = saved
  tokens, heads, dim = _flat(qkv)
  scale = dim**-0.5
  count = _count(qkv, windows)
  each = _windows_a_program(count, heads)

  def kernel(qkv_ref, bias_ref, of_out_ref, of_qkv_ref, of_bias_ref):
    first, head = pl.program_id(0) * each, pl.program_id(1)

    def one(i, of_bias):
      place = windows.place(first + i)
      q, k, v = (_read(qkv_ref, place, j * heads + head) for j in range(3))
      of_window = _read(of_out_ref, place, head)
      attention = _attention(q, k, bias_ref[0], place, windows)
      of_v = _product(attention.astype(v.dtype), of_window, (0, 0))
      of_attention = _product(of_window, v, (1, 1))
      mean = jnp.sum(attention * of_attention, axis=1, keepdims=True)
      of_logits = attention * (of_attention - mean)
      rounded = (of_logits * scale).astype(q.dtype)
      _write(of_qkv_ref, place, head, _product(rounded, k, (1, 0)))
      _write(of_qkv_ref, place, heads + head, _product(rounded, q, (0, 0)))
      _write(of_qkv_ref, place, 2 * heads + head, of_v)
      return of_bias + of_logits

    block = windows.block
    of_bias_ref[0, 0] = jax.lax.fori_loop(0, each, one, jnp.zeros((block, block), jnp.float32))

  block, n = windows.block, windows.positions
  of_qkv, of_bias = _call(
    kernel, "window_attention_gradient", grid=(count // each, heads),
    in_specs=[_whole(), _bias_spec(windows, lambda part, head: (head, 0, 0)), _whole()],
    out_specs=[_whole(), pl.BlockSpec((1, 1, block, block), lambda part, head: (part, head, 0, 0))],
    out_shape=[
      jax.ShapeDtypeStruct((tokens, 3 * heads, dim), qkv.dtype),
      jax.ShapeDtypeStruct((count // each, heads, block, block), jnp.float32),
    ],
    interpret=interpret,
  )(
    qkv.reshape(tokens, 3 * heads, dim), _padded(bias, windows),
    of_out.reshape(tokens, heads, dim),
  )  # fmt: skip
  return of_qkv.reshape(qkv.shape), jnp.sum(of_bias, 0)[:, :n, :n].astype(bias.dtype)


attend.defvjp(_forward_for_gradient, _backward)


def _attention(q, k, bias, place, windows) -> jax.Array:
  """[block, block] float32, rows sum to one."""
  _, _, region = place
  logits = _product(q, k, (1, 1)) * q.shape[-1] ** -0.5 + bias
  if any(windows.shift):
    logits = jnp.where(region[:, None] == region[None, :], logits, logits - 100.0)
  weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
  return weights / jnp.sum(weights, axis=1, keepdims=True)


def _product(a, b, over: tuple[int, int]) -> jax.Array:
  """Product over an axis of each, in float32."""
  numbers = ((over[:1], over[1:]), ((), ()))
  return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _read(ref, place, column) -> jax.Array:
  """[block, dim] of [tokens, columns, dim]; zeros where no token is."""
  at, mask = _at(ref, place, column)
  return triton.load(ref.at[at], mask=mask, other=0.0)


def _write(ref, place, column, value) -> None:
  at, mask = _at(ref, place, column)
  triton.store(ref.at[at], value.astype(ref.dtype), mask=mask)


def _at(ref, place, column):
  """Indices of [block, dim] of [tokens, columns, dim], and which of them are there."""
  token, inside, _ = place
  tokens, _, dim = ref.shape
  shape = token.shape[0], dim
  # Outside, an index that nothing has: interpreted, a write to what is masked still reads it.
  token = jnp.where(inside, token, tokens)
  at = token[:, None], column, jnp.arange(dim)[None]
  at = tuple(jnp.broadcast_to(index, shape) for index in at)
  return at, jnp.broadcast_to(inside[:, None], shape)


def _padded(bias, windows) -> jax.Array:
  fill = windows.block - windows.positions
  bias = jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, fill), (0, 0)))
  return jnp.pad(bias, ((0, 0), (0, 0), (0, fill)), constant_values=_MASKED)


def _flat(qkv) -> tuple[int, int, int]:
  """Tokens, heads, width of a head."""
  return int(np.prod(qkv.shape[:3])), qkv.shape[4], qkv.shape[5]


def _count(qkv, windows) -> int:
  return qkv.shape[0] * windows.per_image


def _windows_a_program(count: int, heads: int) -> int:
  """A divisor of the number of windows, so that no program has fewer than the others."""
  wanted = max(1, count * heads // _PROGRAMS)
  return next(each for each in range(wanted, 0, -1) if count % each == 0)


def _whole() -> pl.BlockSpec:
  return pl.BlockSpec(memory_space=pl.ANY)


def _bias_spec(windows, index) -> pl.BlockSpec:
  return pl.BlockSpec((1, windows.block, windows.block), index)


def _call(kernel, name, **arguments):
  return pl.pallas_call(
    kernel, name=name, compiler_params=triton.CompilerParams(num_warps=4, num_stages=1), **arguments
  )
