import os
import signal

import pytest

from crn_jax.workdir.interrupt import Interrupted, Interruption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted(number):
  with Interruption() as interruption:
    assert interruption.signal is None
    os.kill(os.getpid(), number)
    assert interruption.signal == number


@pytest.mark.usefixtures("usual_handler")
def test_the_second_signal_acts():
  with Interruption(), pytest.raises(KeyboardInterrupt):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_as_before_afterwards():
  before = signal.getsignal(signal.SIGTERM)
  with Interruption():
    assert signal.getsignal(signal.SIGTERM) != before
  assert signal.getsignal(signal.SIGTERM) == before


def test_the_exception_says_where_the_run_stands():
  assert str(Interrupted(7, signal.SIGTERM)) == "stopped at step 7 by SIGTERM"
  stopped = Interrupted(7, signal.SIGINT, unit="picture")
  assert str(stopped) == "stopped at picture 7 by SIGINT"


def test_what_is_finished_first_is_said(capfd):
  with Interruption("batch"):
    os.kill(os.getpid(), signal.SIGINT)
  assert "SIGINT: saving after this batch; again to leave" in capfd.readouterr().out
