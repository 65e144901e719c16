"""The progress of a training for people to see, and the metrics of its steps."""

import datetime
import math
import sys
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import tqdm

from crn_jax.errors import UserError
from crn_jax.parallel import DataParallel, is_primary
from crn_jax.workdir import logs

# Seconds between two updates of the bar in a terminal, and between two lines elsewhere.
_BAR_INTERVAL, _LINE_INTERVAL = 0.5, 30.0
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"


class Progress:
  """The progress of a training, and the metrics of the steps since they were last read.

  A bar in a terminal, else a line every half minute, in the primary process only. Metrics stay on
  the device until they are read, so that no step waits for the one before.
  """

  def __init__(self, config, start: int, total_steps: int, steps_per_epoch: int, stride: int = 1):
    """Begins after step `start`.

    Args:
      config: the whole configuration.
      start, total_steps: steps done before, and at the end.
      steps_per_epoch: of an epoch.
      stride: steps that are done at once.
    """
    self._config, self._total = config, total_steps
    self._steps_per_epoch, self._stride = steps_per_epoch, stride
    self._step = start
    self._pending: list[Mapping[str, jax.Array]] = []
    self._since: float | None = None  # From when `_timed` steps count; None before the first.
    self._timed = 0
    self._rate: float | None = None
    self._latest = ""
    self._shown = time.monotonic()
    self._bar = None
    if is_primary() and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        initial=start, total=total_steps, bar_format=_BAR, mininterval=0, dynamic_ncols=True
      )

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    if self._bar is not None:
      self._show()
      self._bar.close()

  def stepped(self, metrics: Mapping[str, jax.Array]) -> None:
    """Notes the metrics of one more step, or the means of as many as are done at once."""
    self._step += self._stride
    self._pending.append(metrics)
    if self._since is None:
      jax.block_until_ready(metrics)  # The first step was compiled: it says nothing of the rest.
      self._since = time.monotonic()
    else:
      self._timed += self._stride
    interval = _LINE_INTERVAL if self._bar is None else _BAR_INTERVAL
    if time.monotonic() - self._shown >= interval:
      self._show()

  def read(self, parallel: DataParallel, checkpoints: Sequence[int]) -> dict[str, float]:
    """Means of the metrics since they were last read, with speed and memory.

    Args:
      parallel: layout of the metrics over devices.
      checkpoints: steps of those that are there, for the message of an error.

    Raises:
      UserError: names the first step with a value that is not finite.
    """
    fetched = [{k: float(v) for k, v in parallel.fetch(m).items()} for m in self._pending]
    first = self._step - (len(fetched) - 1) * self._stride
    for i, values in enumerate(fetched):
      _check_finite(values, first + i * self._stride, checkpoints, self._config.model.dtype)
    now = time.monotonic()
    means = {k: float(np.mean([m[k] for m in fetched])) for k in fetched[-1]}
    if self._timed:
      self._rate = self._timed * self._config.batch_size / (now - self._since)
      means["examples_per_second"] = self._rate
    means["peak_memory_gib"] = logs.peak_memory_gib()
    totals = [f"{k.removesuffix('/total')} {v:.3f}" for k, v in means.items() if "/total" in k]
    self._latest = f"loss {', '.join(totals)}, memory {means['peak_memory_gib']:.1f} GiB"
    self._pending, self._since, self._timed = [], now, 0
    return means

  def say(self, text: str) -> None:
    """Prints a line; the time until now does not count as training."""
    if not is_primary():
      pass
    elif self._bar is None:
      print(text, flush=True)
    else:
      self._bar.write(text)
    self._since, self._timed = time.monotonic(), 0

  def _show(self) -> None:
    self._shown = time.monotonic()
    if not is_primary():
      return
    rate = self._rate_now()
    parts = []
    if rate:
      left = (self._total - self._step) * self._config.batch_size / rate
      time_left = datetime.timedelta(seconds=round(left))
      parts = [f"{rate:,.0f} examples/s, {time_left} left"]
    parts += [self._latest] if self._latest else []
    epoch = -(-self._step // self._steps_per_epoch)
    description = f"epoch {epoch}/{self._config.num_epochs}"
    if self._bar is None:
      line = [f"{description}: step {self._step}/{self._total}", *parts]
      print(", ".join(line), file=sys.stderr, flush=True)
    else:
      self._bar.n = self._step
      self._bar.set_description_str(description, refresh=False)
      self._bar.set_postfix_str(", ".join(parts), refresh=True)

  def _rate_now(self) -> float | None:
    """Examples a second since metrics were last read; steps under way do not count."""
    under_way = sum(not leaf.is_ready() for m in self._pending for leaf in list(m.values())[:1])
    done = self._timed - under_way * self._stride
    if done < 1:
      return self._rate
    return done * self._config.batch_size / (time.monotonic() - self._since)


def _check_finite(
  metrics: Mapping[str, float], step: int, checkpoints: Sequence[int], dtype: str
) -> None:
  """Raises UserError naming the terms that are not finite."""
  bad = [name for name, value in metrics.items() if not math.isfinite(value)]
  if not bad:
    return
  kept = (
    f"the checkpoint at step {max(checkpoints)} is kept"
    if checkpoints
    else "no checkpoint was written yet"
  )
  if step <= 2:
    advice = "So early it is rarely the learning rate: look at the weights and the pictures"
  else:
    advice = "A lower optimizer.learning_rate or optimizer.clip_norm = 1.0 often helps"
  if dtype != "float32":
    advice += ", and so does model.dtype = 'float32'"
  raise UserError(f"step {step}: {', '.join(bad)} not finite; {kept}. {advice}")
