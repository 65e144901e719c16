"""The progress line of a training, and the metrics of its steps."""

import math
import sys
import time

import tqdm

from crn_jax.models.crn import BRANCHES
from crn_jax.parallel import DataParallel
from crn_jax.workdir import logs


class Progress:
  """The progress line, and the losses of the steps since it was last read.

  Losses stay on the device until they are read, so that no step waits for the one before.
  """

  def __init__(self, config, start: int, total_steps: int, steps_per_epoch: int):
    self._batch_size = config.batch_size
    self._steps_per_epoch = steps_per_epoch
    self._epochs = config.num_epochs
    self._step = start
    self._pending = []
    self._since = time.monotonic()
    self._bar = tqdm.tqdm(
      initial=start * self._batch_size,
      total=total_steps * self._batch_size,
      unit=" examples",
      mininterval=0.5 if sys.stderr.isatty() else 30.0,  # A log file needs no animation.
      dynamic_ncols=True,
    )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()

  def stepped(self, metrics: dict) -> None:
    """Notes the metrics of one more step."""
    if self._bar.n == self._bar.initial:
      self._bar.unpause()  # The first step was compiled, which says nothing of the time left.
    self._step += 1
    self._pending.append(metrics)
    self._bar.set_description(
      f"epoch {-(-self._step // self._steps_per_epoch)}/{self._epochs}", refresh=False
    )
    self._bar.update(self._batch_size)

  def read(self, parallel: DataParallel) -> dict[str, float]:
    """Metrics of the last step, with speed and memory, after a check of all steps since.

    Raises:
      FloatingPointError: names the first step with a value that is not finite.
    """
    first = self._step - len(self._pending) + 1
    fetched = [{k: float(v) for k, v in parallel.fetch(m).items()} for m in self._pending]
    for step, values in enumerate(fetched, first):
      check_finite(values, step)
    now = time.monotonic()
    values = dict(fetched[-1])
    values["examples_per_second"] = len(fetched) * self._batch_size / (now - self._since)
    values["peak_memory_gib"] = logs.peak_memory_gib()
    self._pending, self._since = [], now
    losses = ", ".join(f"{name} {values[f'{name}/total']:.3f}" for name in BRANCHES)
    memory = f"memory {values['peak_memory_gib']:.1f} GiB"
    self._bar.set_postfix_str(f"loss {losses}, {memory}", refresh=False)
    return values

  def say(self, text: str) -> None:
    """Prints a line above the progress line; the time until now does not count as training."""
    self._bar.write(text)
    self._bar.unpause()
    self._since = time.monotonic()


def check_finite(metrics: dict[str, float], step: int) -> None:
  """Raises FloatingPointError naming the terms that are not finite."""
  bad = [name for name, value in metrics.items() if not math.isfinite(value)]
  if bad:
    raise FloatingPointError(
      f"step {step}: {', '.join(bad)} not finite; the last checkpoint is kept. A lower "
      f"optimizer.learning_rate or optimizer.clip_norm = 1.0 often helps"
    )
