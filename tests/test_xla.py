"""What XLA is asked for: flags, and the precision of products."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from crn_jax import state, training_step, xla
from crn_jax.methods import registry
from crn_jax.parallel import AXIS, DataParallel
from crn_jax.retrieval.encode import Encoder
from tests import tiny_model


def test_flags_of_the_user_stay(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
  xla.exclude_nondeterministic_ops()
  xla.exclude_nondeterministic_ops()
  expected = "--xla_cpu_enable_fast_math=false --xla_gpu_exclude_nondeterministic_ops=true"
  assert os.environ["XLA_FLAGS"] == expected
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=false")
  xla.exclude_nondeterministic_ops()
  assert os.environ["XLA_FLAGS"] == "--xla_gpu_exclude_nondeterministic_ops=false"


@pytest.mark.parametrize(
  ("ask", "flag", "word", "other"),
  [
    ("exclude_nondeterministic_ops", "_EXCLUDE", "ops", "opera"),
    ("tune_alone", "_TUNE_ALONE", "autotuning", "autotune"),
  ],
)
def test_xla_reads_the_flag_after_jax_was_imported(ask, flag, word, other):
  """An unknown flag in its place is refused: so it is read, and it is known."""
  program = """
import jax
from crn_jax import xla
xla.{flag} = xla.{flag}.replace("{word}", "{instead}")
xla.{ask}()
print(jax.jit(lambda x: x + 1)(1))
"""
  environment = os.environ | {"XLA_FLAGS": ""}
  for instead, works in ((word, True), (other, False)):
    text = program.format(flag=flag, word=word, instead=instead, ask=ask)
    done = subprocess.run(
      [sys.executable, "-c", text], env=environment, capture_output=True, text=True
    )
    assert (done.returncode == 0) == works, done.stderr[-500:]


@pytest.mark.parametrize(("precision", "expected"), [("default", None), ("highest", "HIGHEST")])
def test_products_have_the_precision_of_the_configuration(precision, expected):
  """Of a training step and of evaluation; scores of the losses have all of float32 in any case."""
  config = tiny_model.config()
  config.model.precision, config.batch_size, config.eval.batch_size = precision, 2, 2
  parallel = DataParallel.create("shard_map", jax.devices()[:1])
  method = registry.create(config, tiny_model.VOCAB_SIZE, AXIS)
  tx = method.optimizer(1, 1)
  step = training_step.compiled(method, tx, parallel)
  text = step.lower(state.abstract(method), training_step.abstract_batch(method)).as_text()
  products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
  exact = sum("precision = [HIGHEST, HIGHEST]" in line for line in products)
  assert exact == len(products) if expected else 0 < exact < len(products) / 4
  pictures = jax.ShapeDtypeStruct((2, 32, 32, 3), np.uint8)
  variables = state.abstract(method).eval_variables()
  encode = Encoder.create(method, parallel).encode_images
  text = encode.lower(variables, pictures).as_text()
  assert ("precision = [HIGHEST, HIGHEST]" in text) == bool(expected)
