"""What a step needs, before it is run: exact counts, and a program that reads no data."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from crn_jax import plan
from tests import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config():
  c = tiny_model.config()
  c.name = "tiny"
  c.optimizer.ema_decay = 0.9
  return c


@pytest.fixture(scope="module")
def planned(quick_compile, config):
  """The needs of a step of the tiny model, and XLA's analysis that they come from."""
  del quick_compile
  analyses = []
  original = jax.stages.Compiled.memory_analysis

  def recording(self):
    analyses.append(original(self))
    return analyses[-1]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.stages.Compiled, "memory_analysis", recording)
    found = plan.create(config)
  return found, analyses[0]


def test_parameters_and_memory_are_counted_exactly(planned, config):
  found, analysis = planned
  made_up = tiny_model.variables(config)
  more_words = (plan.VOCABULARY - tiny_model.VOCAB_SIZE) * config.model.word_dim
  expected = {
    part: sum(x.size for x in jax.tree.leaves(tree)) + more_words
    for part, tree in made_up["params"].items()
  }
  assert found.parameters == expected
  n, statistics = sum(expected.values()), jax.tree.leaves(made_up["batch_stats"])
  picture, words = 32 * 32 * 3, 8
  assert found.memory | {"temporaries": 0, "results": 0} == {
    "parameters": 4 * n,
    "moving average": 4 * n,
    "batch statistics": 4 * sum(x.size for x in statistics),
    # Two moments a parameter, and in each part the steps that Adam and the learning rate count.
    "optimizer": 2 * 4 * n + 2 * 2 * 4,
    "batch": config.batch_size * (2 * picture + words * 4 + words),
    "temporaries": 0,
    "results": 0,
  }
  # The step itself takes its number, too.
  assert analysis.argument_size_in_bytes == 4 + sum(
    size for kind, size in found.memory.items() if kind not in ("temporaries", "results")
  )
  assert found.memory["temporaries"] == analysis.temp_size_in_bytes > found.memory["batch"]
  assert 0 < found.memory["results"] < 0.1 * found.memory["parameters"]


def test_a_larger_batch_needs_more_arithmetic_but_no_more_parameters(planned, config):
  found, _ = planned
  c = config.copy_and_resolve_references()
  c.batch_size *= 2
  c.optimizer.ema_decay = 0.0
  larger = plan.create(c)
  assert larger.parameters == found.parameters
  assert larger.memory["moving average"] == 0
  assert larger.memory["temporaries"] > found.memory["temporaries"]
  # The zero image and its map are encoded once whatever the batch.
  assert 1.9 * found.flops < larger.flops <= 2 * found.flops + found.flops / 100


def test_products_are_counted_as_often_as_they_run():
  x, w = jnp.ones((3, 4, 5)), jnp.ones((5, 7))

  def loop(x, w):
    def body(carry, _):
      return carry, jnp.einsum("abc,cd->abd", x, jax.nn.relu(w))

    return jax.lax.scan(body, 0, length=6)

  assert plan.flops(jax.make_jaxpr(loop)(x, w).jaxpr) == 6 * 2 * (3 * 4 * 7) * 5
  gradient = jax.grad(lambda w: jax.jit(lambda w: (x @ w).sum())(w))
  # The product itself is not needed, but it is in the trace.
  assert plan.flops(jax.make_jaxpr(gradient)(w).jaxpr) == 2 * 2 * (3 * 4 * 7) * 5
  picture, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))

  def convolve(x, w):
    return jax.lax.conv_general_dilated(
      x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  assert plan.flops(jax.make_jaxpr(convolve)(picture, kernel).jaxpr) == 2 * (2 * 64 * 5) * 27


def needs(total: int, **changes) -> plan.Needs:
  fields = {
    "name": "n", "platform": "gpu", "device": "a card", "batch_size": 16, "vocabulary": 5,
    "parameters": {"local": 1_000}, "flops": 10**12, "memory": {"parameters": total},
    "smaller": ["a lower batch_size"],
  }  # fmt: skip
  return plan.Needs(**fields | changes)


def test_a_card_holds_what_jax_takes_of_it():
  gib = 2**30
  assert needs(18 * gib).fits(24) == "yes"
  assert needs(18 * gib + 1).fits(24) == "with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
  assert needs(23 * gib).fits(24) == "no"
  assert needs(23 * gib).to_json()["cards"] == {
    "16 GiB": "no", "24 GiB": "no", "40 GiB": "yes", "80 GiB": "yes",
  }  # fmt: skip
  assert "for a CPU" in needs(1, platform="cpu").to_text()
  assert "for a CPU" not in needs(1).to_text()


def test_a_hint_names_only_what_would_change_something(config):
  assert "model.dtype=bfloat16" in plan._smaller(config)
  c = config.copy_and_resolve_references()
  c.model.dtype = "bfloat16"
  assert not [hint for hint in plan._smaller(c) if "dtype" in hint]


def test_the_program_prints_json_without_data_weights_or_tensorflow(tmp_path, planned):
  (tmp_path / "tiny.py").write_text(
    "from tests import tiny_model\n\n\ndef get_config():\n  c = tiny_model.config()\n"
    "  c.name = 'tiny'\n  c.optimizer.ema_decay = 0.9\n  return c\n"
  )
  for name in ("tensorflow", "tensorflow_datasets"):
    (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')\n")
  env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
  done = subprocess.run(
    [sys.executable, str(ROOT / "main.py"), f"--config={tmp_path / 'tiny.py'}", "--mode=plan",
     "--json", "--compilation_cache=none"],
    cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found, expected = json.loads(done.stdout), planned[0].to_json()
  # Tests run on eight devices that share a machine, whose program may lay out other temporaries.
  assert found["memory"].keys() == expected["memory"].keys()
  for result in (found, expected):
    del result["memory"]["temporaries"], result["total"]
  assert found == expected
  assert not (tmp_path / "runs").exists()
