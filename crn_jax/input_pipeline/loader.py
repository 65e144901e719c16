"""tf.data pipelines from plain splits to batches of NumPy arrays.

Everything random is a pure function of (seed, epoch, position in the epoch), so a run that is
resumed at any step, or spread over any number of processes, sees the same pictures. Images stay
uint8; normalising them belongs on the device. Decoding runs in parallel in Pillow, which
releases the GIL.
"""

import collections
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from crn_jax.errors import UserError
from crn_jax.input_pipeline import images
from crn_jax.input_pipeline.dataset import AUGMENT, ORDER, ImageStore, TrainSplit
from crn_jax.input_pipeline.tokenizers.base import Tokenizer

AUGMENTATIONS = ("random_crop_flip", "none")

_PADDING = -1
_MAX_CHUNK = 8


def steps_per_epoch(n: int, batch_size: int) -> int:
  """Number of whole batches in n items; the incomplete last one is dropped.

  Raises:
    UserError: batch_size is not in 1 .. n.
  """
  if not 1 <= batch_size <= n:
    raise UserError(
      f"batch_size: expected 1 .. {n}, the number of train triplets, got {batch_size}"
    )
  return n // batch_size


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
  """The items of an epoch in the order in which they are seen.

  Returns:
    [n] int64, a permutation of 0 .. n - 1.
  """
  return np.random.default_rng([seed, epoch, ORDER]).permutation(n)


def epoch_draws(n: int, seed: int, epoch: int) -> np.ndarray:
  """Random numbers of an epoch's augmentation.

  Returns:
    [n, 2, 3] float64 in [0, 1): position in the epoch; reference, target; row offset, column
    offset, flip.
  """
  return np.random.default_rng([seed, epoch, AUGMENT]).random((n, 2, 3))


def augment(image: np.ndarray, draws: np.ndarray, size: int) -> np.ndarray:
  """Random crop and random horizontal flip (probability 1/2).

  Args:
    image: [h, w, 3] uint8.
    draws: [3] uniform in [0, 1): row offset, column offset, flip.
    size: side of the crop in pixels.

  Returns:
    [size, size, 3] uint8.
  """
  height, width = image.shape[:2]
  top = int(draws[0] * (height - size + 1))
  left = int(draws[1] * (width - size + 1))
  return images.crop_and_flip(image, top, left, bool(draws[2] < 0.5), size)


def train_batches(
  split: TrainSplit,
  vocabulary: Tokenizer,
  *,
  batch_size: int,
  sizing: images.Sizing,
  augmentation: str,
  seed: int,
  num_steps: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  cache_images: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of steps start_step .. num_steps - 1, as a run from step 0 would see them.

  An epoch is a permutation of its triplets cut into batches; the incomplete last batch is dropped.
  Processes get contiguous slices of each global batch.

  Args:
    split: the training data.
    vocabulary: turns the texts into ids.
    batch_size: of the global batch, over all processes.
    sizing: how pictures are brought to squares of side S.
    augmentation: "random_crop_flip" (reference and target independently) or "none" (central crop).
    seed: of order, augmentation and the drawing of triplets, 0 or greater.
    num_steps: steps of the whole run; num_steps - start_step batches come.
    start_step: first step, counted from 0. Earlier batches cost nothing.
    process_index: of this process.
    process_count: number of processes.
    cache_images: keep every image in memory once it is decoded and resized; for small sets.

  Returns:
    Iterator over dicts, with b = batch_size / process_count:
      reference, target: [b, S, S, 3] uint8.
      tokens: [b, L] int32.
      token_mask: [b, L] bool.
    An image that cannot be decoded raises its UserError or FileNotFoundError from `next`.

  Raises:
    UserError: sizes that do not fit, an unknown augmentation, or fewer triplets than a batch.
    ValueError: steps or processes that do not exist.
  """
  n = len(split.triplets)
  local = local_slice(batch_size, process_index, process_count)
  per_epoch = steps_per_epoch(n, batch_size)
  images.check_sizing(sizing)
  if augmentation not in AUGMENTATIONS:
    raise UserError(f"augmentation: expected one of {AUGMENTATIONS}, got {augmentation!r}")
  if not 0 <= start_step <= num_steps:
    raise ValueError(f"start_step: expected 0 .. num_steps = {num_steps}, got {start_step}")

  image_size = sizing.image_size
  read = _reader(split.image_paths, sizing, cache_images, split.store)

  @functools.lru_cache(maxsize=1)
  def encoded(triplets):
    rows = np.stack([triplets.reference, triplets.target], axis=1)
    return rows, *vocabulary.encode_all(triplets.texts)

  @functools.lru_cache(maxsize=1)
  def epoch_tables(epoch):
    triplets = split.triplets.draw(seed, epoch)
    return encoded(triplets), epoch_order(n, seed, epoch), epoch_draws(n, seed, epoch)

  epoch_tables(start_step // per_epoch)  # Here, so that its warnings come at once.

  def plan(step):
    """Which rows to read with which random numbers: a few small arrays per step."""
    (rows, tokens, token_mask), order, draws = epoch_tables(int(step // per_epoch))
    first = int(step % per_epoch) * batch_size
    here = slice(first + local.start, first + local.stop)
    items = order[here]
    return rows[items], draws[here], tokens[items], token_mask[items]

  def load_one(row, item_draws):
    if augmentation == "none":
      return images.center_crop(read(row), image_size)
    return augment(read(row), item_draws, image_size)

  def load(chunk_rows, chunk_draws):
    return [
      np.stack([load_one(*item) for item in zip(chunk_rows[:, i], chunk_draws[:, i], strict=True)])
      for i in range(2)
    ]

  tf = _import_tensorflow()
  b, length = local.stop - local.start, vocabulary.max_words
  errors: list[Exception] = []
  image_spec = tf.TensorSpec((None, image_size, image_size, 3), tf.uint8)
  load_in_graph = _graph_function(tf, load, (image_spec, image_spec), errors)

  def to_example(chunk_rows, chunk_draws, chunk_tokens, chunk_mask):
    reference, target = load_in_graph(chunk_rows, chunk_draws)
    return {
      "reference": reference,
      "target": target,
      "tokens": chunk_tokens,
      "token_mask": chunk_mask,
    }

  plan_in_graph = _graph_function(
    tf,
    plan,
    (
      tf.TensorSpec((b, 2), tf.int32),
      tf.TensorSpec((b, 2, 3), tf.float64),
      tf.TensorSpec((b, length), tf.int32),
      tf.TensorSpec((b, length), tf.bool),
    ),
    errors,
  )
  dataset = tf.data.Dataset.range(start_step, num_steps).map(plan_in_graph).unbatch()
  return _batches(tf, dataset, to_example, b, errors)


def eval_image_batches(
  paths: Sequence[str],
  *,
  batch_size: int,
  sizing: images.Sizing,
  store: ImageStore | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[np.ndarray]:
  """Centrally cropped images in order, in batches of one shape.

  Processes get contiguous slices of each global batch.

  Args:
    paths: of n images.
    batch_size: of the global batch, over all processes.
    sizing: how pictures are brought to squares of side S.
    store: where to read the images; None decodes the files.
    process_index: of this process.
    process_count: number of processes.

  Returns:
    Iterator over ceil(n / batch_size) arrays [batch_size / process_count, S, S, 3] uint8; the last
    global batch is filled up with zeros. An image that cannot be decoded raises its UserError or
    FileNotFoundError from `next`.

  Raises:
    UserError: sizes that do not fit.
    ValueError: a process that does not exist.
  """
  local = local_slice(batch_size, process_index, process_count)
  images.check_sizing(sizing)
  n_batches = -(-len(paths) // batch_size)
  rows = np.full(n_batches * batch_size, _PADDING, np.int32)
  rows[: len(paths)] = np.arange(len(paths))
  local_rows = rows.reshape(n_batches, batch_size)[:, local].ravel()
  image_size = sizing.image_size
  read = _reader(paths, sizing, keep=False, store=store)

  def load(chunk_rows):
    loaded = np.zeros((len(chunk_rows), image_size, image_size, 3), np.uint8)
    for i, row in enumerate(chunk_rows):
      if row != _PADDING:
        loaded[i] = images.center_crop(read(row), image_size)
    return loaded

  tf = _import_tensorflow()
  errors: list[Exception] = []
  image_spec = tf.TensorSpec((None, image_size, image_size, 3), tf.uint8)
  load_in_graph = _graph_function(tf, load, image_spec, errors)
  dataset = tf.data.Dataset.from_tensor_slices(local_rows)
  return _batches(tf, dataset, load_in_graph, local.stop - local.start, errors)


def under_way(batches: Iterable, start: Callable, size: int = 2) -> Iterator:
  """Keeps `size` batches under way, so that the device need not wait for what is done with one.

  Args:
    batches: to be worked on.
    start: starts work on one and returns at once, e.g. its copy by `jax.device_put`.
    size: batches started ahead of the one handed out; at least 1.

  Yields:
    What `start` returned, in order.

  Raises:
    ValueError: size < 1.
  """
  if size < 1:
    raise ValueError(f"size: expected 1 or more, got {size}")
  return _under_way(batches, start, size)


def _under_way(batches, start, size):
  started = collections.deque()
  for batch in batches:
    started.append(start(batch))
    if len(started) > size:
      yield started.popleft()
  yield from started


def _import_tensorflow():
  # Late, because it takes seconds; without a GPU, because JAX needs its memory.
  import tensorflow as tf

  tf.config.set_visible_devices([], "GPU")
  return tf


def local_slice(batch_size: int, process_index: int, process_count: int) -> slice:
  """The part of each global batch that belongs to a process."""
  if not 0 <= process_index < process_count:
    raise ValueError(f"process_index: expected 0 .. {process_count - 1}, got {process_index}")
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f"batch_size: {batch_size} cannot be divided evenly among {process_count} processes"
    )
  b = batch_size // process_count
  return slice(process_index * b, (process_index + 1) * b)


def _reader(
  paths: Sequence[str],
  sizing: images.Sizing,
  keep: bool,
  store: ImageStore | None,
) -> Callable[[int], np.ndarray]:
  """row -> image [h, w, 3] uint8, resized. What a store has was, by its shorter side alone."""

  def read(row):
    if store is not None:
      return store.read(paths[row])
    return images.read(paths[row], sizing)

  # Two threads may decode the same image at the same time; the cache then keeps either.
  return functools.cache(read) if keep else read


def _graph_function(tf, function, specs, errors: list[Exception]):
  """Wraps a function of arrays for tf.data: states its results and notes what it raises."""

  def noting_errors(*args):
    try:
      return function(*args)
    except Exception as error:
      errors.append(error)
      raise

  def in_graph(*args):
    flat_specs = tf.nest.flatten(specs)
    dtypes = [spec.dtype for spec in flat_specs]
    results = tf.nest.flatten(tf.numpy_function(noting_errors, args, dtypes, stateful=False))
    shaped = [tf.ensure_shape(r, spec.shape) for r, spec in zip(results, flat_specs, strict=True)]
    return tf.nest.pack_sequence_as(specs, shaped)

  return in_graph


def _batches(tf, dataset, load, b: int, errors: list[Exception]) -> Iterator:
  """Loads single elements of `dataset` in parallel but in order, and makes batches of b."""
  # A call into Python costs more than a cached thumbnail: one call loads a few examples.
  chunk = math.gcd(b, _MAX_CHUNK)
  dataset = dataset.batch(chunk, drop_remainder=True)
  dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  dataset = dataset.batch(b // chunk, drop_remainder=True).prefetch(2)

  held = [dataset.as_numpy_iterator()]
  op_error = tf.errors.OpError  # Looked up now: when Python shuts down, `tf` may be gone.

  def merge_chunks(array):
    return array.reshape(b, *array.shape[2:])

  def iterate():
    try:
      while True:
        yield tf.nest.map_structure(merge_chunks, next(held[0]))
    except StopIteration:
      return
    except op_error:
      # TensorFlow's error quotes a traceback of its own threads; ours names the file.
      if errors:
        raise errors[0] from None
      raise
    finally:
      held.clear()

  batches = iterate()
  # TensorFlow's threads run our functions. Were they alive when Python shuts down, after a failure
  # or Ctrl-C in training, the process would wait for them for ever; finalize runs before that.
  weakref.finalize(batches, held.clear)
  return batches
