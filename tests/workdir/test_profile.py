"""Traces of steps: which are recorded, and that a file for TensorBoard appears."""

import jax
import jax.numpy as jnp
import pytest

from crn_jax.workdir.profile import Profile


def run(profile, first: int, last: int) -> None:
  with profile:
    for step in range(first, last + 1):
      profile.before(step)
      profile.after(step, jnp.float32(step) + 1)


@pytest.mark.parametrize(
  ("steps", "first", "last", "expected"),
  [
    ((2, 4), 1, 6, ["start 2", "stop 4"]),
    ((3, 3), 1, 6, ["start 3", "stop 3"]),
    ((), 1, 3, []),
    ((2, 4), 3, 6, ["start 3", "stop 4"]),  # The run was continued at step 3.
    ((2, 4), 5, 6, []),
    ((2, 9), 1, 6, ["start 2", "stop 6"]),  # The run ends before.
  ],
)
def test_the_steps_asked_for_are_recorded(steps, first, last, expected, monkeypatch):
  calls, now = [], [0]
  original = Profile.before

  def before(self, step):
    now[0] = step
    original(self, step)

  monkeypatch.setattr(Profile, "before", before)
  monkeypatch.setattr(jax.profiler, "start_trace", lambda _: calls.append(f"start {now[0]}"))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(f"stop {now[0]}"))
  run(Profile("folder", steps), first, last)
  assert calls == expected


def test_what_was_under_way_at_an_error_is_written(tmp_path):
  with pytest.raises(KeyError), Profile(tmp_path, (1, 3)) as profile:
    profile.before(1)
    raise KeyError
  assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
