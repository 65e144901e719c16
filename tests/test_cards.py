"""Compiling for a GPU that is not there, as far as that goes without JAX's CUDA plugin."""

import types

import jax
import pytest
from jax.experimental import topologies

from benchmarks import gpu_program
from crn_jax import cards, plan, platforms
from crn_jax.errors import UserError
from crn_jax.models.backbones import window_attention
from tests import tiny_model


def test_an_unknown_card_is_answered_with_those_there_are():
  with pytest.raises(UserError, match="--card=h99: there are h100, a100, rtx4090"):
    cards.device("h99")


def test_without_the_plugin_it_is_said_how_to_get_it(monkeypatch):
  def missing(**_):
    raise NotImplementedError("topology not implemented for cuda")

  monkeypatch.setattr(topologies, "get_topology_desc", missing)
  with pytest.raises(UserError, match=r"--card=a100 needs .* pip install -e '.\[cuda\]'"):
    cards.device("a100")


@pytest.mark.parametrize("name", cards.NAMES)
def test_a_description_is_whole(name, monkeypatch):
  """Its braces close and the fields of all cards are there, once; XLA does not read it here."""
  seen = []

  def recorded(**asked):
    seen.append(asked)
    return types.SimpleNamespace(devices=jax.devices())

  monkeypatch.setattr(topologies, "get_topology_desc", recorded)
  assert cards.device(name) == jax.devices()[0]
  (asked,) = seen
  description = asked.pop("target_config")
  assert asked == {"platform": "cuda", "topology": "1x1x1"}
  assert description.count("{") == description.count("}")
  assert "%s" not in description
  for field in ("registers_per_core_limit", "runtime_version", "device_description_str"):
    assert description.count(field) == 1


def test_what_is_traced_for_a_card_takes_its_kernels():
  gpu = types.SimpleNamespace(platform="gpu")
  windows = window_attention.Windows.of_grid((14, 14), 7, True)

  def chosen():
    return window_attention.chosen(jax.numpy.bfloat16, 32, (14, 14), windows)

  assert not chosen()
  with platforms.tracing_for(gpu):
    assert platforms.current() == "gpu"
    assert chosen()
  with pytest.raises(KeyError), platforms.tracing_for(gpu):
    raise KeyError
  assert platforms.current() == "cpu"
  assert not chosen()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_a_step_is_planned_for_a_card(monkeypatch):
  """With a device that is there in the place of the card's: of the rest nothing is different."""
  asked, compiled, used = [], jax.stages.Lowered.compile, []
  monkeypatch.setattr(cards, "device", lambda name: asked.append(name) or jax.devices()[1])
  monkeypatch.setattr(
    jax.stages.Lowered, "compile", lambda self, o=None: used.append(o) or compiled(self, o)
  )
  traced_for, tracing_for = [], platforms.tracing_for
  monkeypatch.setattr(
    platforms, "tracing_for", lambda device: traced_for.append(device) or tracing_for(device)
  )
  found = plan.create(tiny_model.config(), "rtx4090")
  assert asked == ["rtx4090"]
  assert traced_for == [jax.devices()[1]]
  assert used == [cards.COMPILER_OPTIONS]
  assert found.memory["temporaries"] > found.memory["batch"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_the_program_of_a_card_is_counted(monkeypatch):
  monkeypatch.setattr(cards, "device", lambda name: jax.devices()[1])
  config = tiny_model.config()
  config.name = "tiny"
  found, text = gpu_program.compiled(config, "h100")
  assert found["batch_size"] == config.batch_size
  assert found["tflop_per_step"] > 0
  assert found["stablehlo_lines"] > 0
  assert sum(x.launches for x in gpu_program.kernels(text)) > 0
