"""The progress of a training, as a terminal and as a log file show it."""

import re

import jax.numpy as jnp
import pytest

from configs import default
from crn_jax.parallel import DataParallel
from crn_jax.workdir import progress as module
from crn_jax.workdir.progress import Progress


class Clock:
  """Time that passes only when it is told to."""

  def __init__(self):
    self.now = 100.0

  def monotonic(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(module, "time", clock)
  return clock


def config():
  c = default.get_config()
  c.batch_size, c.num_epochs = 16, 3
  return c


def metrics(total: float) -> dict:
  return {"local/total": jnp.float32(total), "global/total": jnp.float32(2 * total)}


PARALLEL = DataParallel.create("shard_map")


def test_a_log_file_gets_a_line_every_half_minute_without_control_characters(clock, capsys):
  with Progress(config(), 0, 30, 10) as progress:
    for step in range(1, 21):
      clock.now += 10.0  # A step takes ten seconds: 1.6 examples a second.
      progress.stepped(metrics(step))
      if step % 4 == 0:
        progress.read(PARALLEL, [])
  text = capsys.readouterr().err
  lines = text.splitlines()
  assert not re.search(r"[\r\x1b]", text)
  assert [re.match(r"epoch \d/3: step (\d+)/30", line)[1] for line in lines] == [
    "3", "6", "9", "12", "15", "18"
  ]  # fmt: skip
  assert lines[-1].startswith("epoch 2/3: step 18/30, 2 examples/s, 0:02:00 left, loss global ")


def test_the_rate_is_that_of_finished_steps_without_the_first(clock):
  with Progress(config(), 0, 30, 10) as progress:
    clock.now += 60.0  # The first step was compiled.
    progress.stepped(metrics(1.0))
    for _ in range(4):
      clock.now += 2.0
      progress.stepped(metrics(1.0))
    assert progress.read(PARALLEL, [])["examples_per_second"] == pytest.approx(16 / 2.0)
    clock.now += 500.0  # An evaluation.
    progress.say("step 5: done")
    clock.now += 4.0
    progress.stepped(metrics(1.0))
    assert progress.read(PARALLEL, [])["examples_per_second"] == pytest.approx(16 / 4.0)


def test_what_is_read_are_means_since_it_was_last_read(clock):
  with Progress(config(), 0, 30, 10) as progress:
    for total in (1.0, 2.0, 6.0):
      clock.now += 1.0
      progress.stepped(metrics(total))
    assert progress.read(PARALLEL, [])["local/total"] == pytest.approx(3.0)
    clock.now += 1.0
    progress.stepped(metrics(5.0))
    assert progress.read(PARALLEL, [])["global/total"] == pytest.approx(10.0)


@pytest.mark.parametrize(
  ("step", "checkpoints", "dtype", "expected"),
  [
    (9, [4, 8], "float32", ("the checkpoint at step 8 is kept", "lower optimizer.learning_rate")),
    (9, [], "bfloat16", ("no checkpoint was written yet", "model.dtype = 'float32'")),
    (1, [], "float32", ("no checkpoint was written yet", "look at the weights and the pictures")),
  ],
)
def test_a_loss_that_is_not_finite_says_what_is_left_and_what_may_help(
  clock, step, checkpoints, dtype, expected
):
  c = config()
  c.model.dtype = dtype
  with Progress(c, step - 1, 30, 10) as progress:
    progress.stepped(metrics(float("nan")))
    with pytest.raises(
      module.UserError, match=f"step {step}: global/total, local/total not"
    ) as error:
      progress.read(PARALLEL, checkpoints)
  for part in expected:
    assert part in str(error.value)
