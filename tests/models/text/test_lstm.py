"""The LSTM is PyTorch's, and so is its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from crn_jax.models.text.lstm import TextEncoder, lstm

VOCAB_SIZE, WORD_DIM, WIDTH = 9, 5, 8
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 6))


@pytest.fixture(scope="module")
def params():
  encoder = TextEncoder(VOCAB_SIZE, WORD_DIM, WIDTH)
  drawn = jax.jit(encoder.init)(jax.random.key(0), TOKENS)["params"]
  return jax.tree.map(lambda x: np.asarray(x, np.float64), drawn)


def pytorchs(params) -> tuple[torch.nn.Embedding, torch.nn.LSTM]:
  """PyTorch's modules with our parameters."""
  embedding = torch.nn.Embedding(VOCAB_SIZE, WORD_DIM).double()
  module = torch.nn.LSTM(WORD_DIM, WIDTH, batch_first=True).double()
  values = {
    "weight_ih_l0": params["input_gates"]["kernel"].T,
    "weight_hh_l0": params["hidden_kernel"].T,
    "bias_ih_l0": params["input_gates"]["bias"],
    "bias_hh_l0": params["hidden_bias"],
  }
  module.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
  embedding.load_state_dict({"weight": torch.tensor(params["embedding"]["embedding"])})
  return embedding, module


def test_values_and_gradients_are_those_of_pytorch_in_float64(params):
  of_out = np.random.default_rng(1).normal(size=(*TOKENS.shape, WIDTH))
  embedding, module = pytorchs(params)
  expected, _ = module(embedding(torch.tensor(TOKENS)))
  expected.backward(torch.tensor(of_out))
  with jax.enable_x64():
    encoder = TextEncoder(VOCAB_SIZE, WORD_DIM, WIDTH, jnp.float64)
    out, pull_back = jax.vjp(lambda p: encoder.apply({"params": p}, TOKENS), params)
    (grads,) = pull_back(jnp.asarray(of_out))
  np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-14)
  theirs = {
    "input_gates": {"kernel": module.weight_ih_l0.grad.T, "bias": module.bias_ih_l0.grad},
    "hidden_kernel": module.weight_hh_l0.grad.T,
    "hidden_bias": module.bias_hh_l0.grad,
    "embedding": {"embedding": embedding.weight.grad},
  }
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b.numpy(), atol=1e-13), grads, theirs)


def test_the_gradient_of_a_bfloat16_kernel_is_rounded_once_not_at_every_word():
  """512 words add the same to it: a sum in bfloat16 stands still when it is 256 times as large.

  With a kernel of zeros the gates come from the input alone, and all words but the first are alike.
  2^-7: a rounding of each factor and of the sum, with room for as many again.
  """
  words, width = 513, 2

  def grad(dtype):
    inputs = jnp.full((words, 1, 4 * width), 0.5, dtype)
    inputs = inputs.at[..., width : 2 * width].set(-30.0)  # Forget gate: nothing is carried on.
    kernel, bias = jnp.zeros((width, 4 * width), dtype), jnp.zeros(4 * width, dtype)
    of_kernel = jax.grad(lambda k: lstm(inputs, k, bias).astype(jnp.float32).sum())(kernel)
    return np.asarray(of_kernel, np.float32)

  exact, rounded = grad(jnp.float32), grad(jnp.bfloat16)
  assert np.abs(exact).max() > 10
  np.testing.assert_allclose(rounded, exact, rtol=0, atol=2**-7 * np.abs(exact).max())


def test_the_kernels_gradient_is_one_product_outside_of_the_loops():
  shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((6, 3, 32), (8, 32), (32,))]
  jaxpr = jax.make_jaxpr(jax.grad(lambda *a: lstm(*a).sum(), (0, 1, 2)))(*shapes).jaxpr
  loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
  assert [str(loop.params["jaxpr"]).count("dot_general[") for loop in loops] == [1, 1]
  assert sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) == 1
