"""One training at a time in a work directory."""

import os
import signal
import subprocess
import sys

import pytest

from crn_jax.errors import UserError
from crn_jax.workdir.lock import lock

HOLD = """
import sys, time
from crn_jax.workdir.lock import lock
with lock(sys.argv[1]):
  print("held", flush=True)
  time.sleep(600)
"""


def test_a_second_one_is_told_who_holds_it(tmp_path):
  message = f"{tmp_path}: a training is under way .*{os.getpid()}"
  with lock(tmp_path), pytest.raises(UserError, match=message), lock(tmp_path):
    pass
  with lock(tmp_path):
    pass


def test_a_killed_process_leaves_none_behind(tmp_path):
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "held\n"
  with pytest.raises(UserError, match=f"process {process.pid} "), lock(tmp_path):
    pass
  process.send_signal(signal.SIGKILL)
  process.wait()
  with lock(tmp_path):
    pass
