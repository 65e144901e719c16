"""main.py in a process that sends itself a signal after a step.

SIGNALLED is PROCESS:SIGNAL:STEP; other processes only take as long for a step.
"""

import os
import runpy
import sys
import time

from crn_jax.workdir.progress import Progress

PROCESS, SIGNAL, STEP = map(int, os.environ["SIGNALLED"].split(":"))
stepped = Progress.stepped


def signalled(self, metrics):
  stepped(self, metrics)
  time.sleep(0.2)  # Steps of so small a model are faster than messages.
  if self._step == STEP and f"--process={PROCESS}" in sys.argv:
    os.kill(os.getpid(), SIGNAL)


Progress.stepped = signalled
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
