"""The bidirectional GRU against PyTorch's of packed sequences, on texts of many lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from crn_jax.models.text.gru import BiGRU

VOCAB, WORD_DIM, WIDTH = 11, 6, 10
LENGTHS = np.array([4, 7, 1, 2, 5])
MASK = np.arange(7) < LENGTHS[:, None]
TOKENS = np.where(MASK, np.random.default_rng(0).integers(1, VOCAB, MASK.shape), 0)
# In float64: sums of tens of products of numbers about one, through seven steps that contract.
TOLERANCE = 1e-13


@pytest.fixture(scope="module")
def variables():
  return BiGRU(VOCAB, WORD_DIM, WIDTH).init(jax.random.key(0), TOKENS, MASK)


def in_pytorch(params) -> torch.nn.GRU:
  """PyTorch's GRU, float64, with the module's weights."""
  gru = torch.nn.GRU(WORD_DIM, WIDTH // 2, bidirectional=True, batch_first=True).double()
  with torch.no_grad():
    for name, suffix in (("forward", ""), ("backward", "_reverse")):
      gates = params[f"{name}_input_gates"]
      for weight, value in (
        ("weight_ih", np.asarray(gates["kernel"]).T),
        ("bias_ih", gates["bias"]),
        ("weight_hh", np.asarray(params[f"{name}_hidden_kernel"]).T),
        ("bias_hh", params[f"{name}_hidden_bias"]),
      ):
        getattr(gru, f"{weight}_l0{suffix}").copy_(torch.tensor(np.asarray(value, np.float64)))
  return gru


def test_it_is_pytorchs_gru_of_packed_sequences(variables):
  params = variables["params"]
  words = torch.tensor(np.asarray(params["embedding"]["embedding"], np.float64)[TOKENS])
  packed = torch.nn.utils.rnn.pack_padded_sequence(
    words, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False
  )
  with torch.no_grad():
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(
      in_pytorch(params)(packed)[0], batch_first=True, total_length=MASK.shape[1]
    )
  with jax.enable_x64():
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    found = BiGRU(VOCAB, WORD_DIM, WIDTH, jnp.float64).apply({"params": wide}, TOKENS, MASK)
  assert found.dtype == np.float64
  np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=TOLERANCE)


def test_its_parameters_start_as_pytorchs(variables):
  """Uniform within 1 / sqrt(width of one direction), all of them."""
  bound = 1 / np.sqrt(WIDTH // 2)
  params = {k: v for k, v in variables["params"].items() if k != "embedding"}
  values = np.concatenate([np.ravel(v) for v in jax.tree.leaves(params)])
  assert values.size == sum(p.numel() for p in in_pytorch(variables["params"]).parameters())
  assert np.abs(values).max() < bound
  assert np.abs(values).max() > 0.95 * bound


def test_what_stands_at_padding_has_no_influence(variables):
  """Other ids there, and more padding, change nothing."""
  module = BiGRU(VOCAB, WORD_DIM, WIDTH)
  expected = module.apply(variables, TOKENS, MASK)
  assert not np.asarray(expected)[~MASK].any()
  others = np.where(MASK, TOKENS, 3)
  np.testing.assert_array_equal(module.apply(variables, others, MASK), expected)
  longer, mask = (np.pad(a, ((0, 0), (0, 3))) for a in (others, MASK))
  np.testing.assert_array_equal(module.apply(variables, longer, mask)[:, :7], expected)


def test_a_gradient_reaches_every_parameter(variables):
  def loss(params):
    words = BiGRU(VOCAB, WORD_DIM, WIDTH).apply({"params": params}, TOKENS, MASK)
    return jnp.sum(jnp.square(words))

  grads = jax.grad(loss)(variables["params"])
  assert all(np.any(g) for g in jax.tree.leaves(grads))


def test_bfloat16_keeps_its_state_in_float32(variables):
  """The features are the rounded ones of float32 up to what rounded weights and products give."""
  found = BiGRU(VOCAB, WORD_DIM, WIDTH, jnp.bfloat16).apply(variables, TOKENS, MASK)
  assert found.dtype == jnp.bfloat16
  expected = BiGRU(VOCAB, WORD_DIM, WIDTH).apply(variables, TOKENS, MASK)
  # Eight bits: 2^-8 of numbers about one (weights, words, state), a dozen of which add up.
  np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=12 * 2.0**-8)


def test_an_odd_width_is_refused():
  with pytest.raises(ValueError, match="must be even, not 9"):
    BiGRU(VOCAB, WORD_DIM, 9).init(jax.random.key(0), TOKENS, MASK)
