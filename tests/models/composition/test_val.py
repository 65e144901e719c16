"""VAL against its formulas in NumPy, and what reaches its parameters."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from crn_jax.models.backbones.feature_maps import FeatureMaps
from crn_jax.models.composition.val import VAL, SelfAttention
from tests.release import double_precision

BATCH, WORDS, WIDTH = 8, 4, 12
CONFIG = ml_collections.FrozenConfigDict({"feature_dim": WIDTH})
pytestmark = pytest.mark.usefixtures("quick_compile")

# A depth that is left out, then even, odd and oblong maps.
SHAPES = [(8, 8, 3), (4, 4, 6), (3, 3, 8), (2, 3, 10)]
LENGTHS = np.array([4, 1, 2, 3, 4, 2, 3, 1])
MASK = np.arange(WORDS) < LENGTHS[:, None]


def val(axis_name=None, dtype=jnp.float32):
  return VAL(config=CONFIG, backbone=None, axis_name=axis_name, dtype=dtype)


def init(maps, words):
  """Fresh variables."""
  start = functools.partial(val().init, train=False, method="compose")
  return jax.jit(start)(jax.random.key(0), maps, words, MASK)


@pytest.fixture(scope="module")
def given():
  """Variables away from their beginning (w_A is no longer 0), maps, words."""
  rng = np.random.default_rng(0)
  maps = tuple(rng.normal(size=(BATCH, *shape)).astype(np.float32) for shape in SHAPES)
  words = rng.normal(size=(BATCH, WORDS, WIDTH)).astype(np.float32)
  fresh = init(maps[1:], words)

  def move(path, x):
    if path[-1].key == "var":
      return rng.uniform(0.5, 2.0, x.shape).astype(np.float32)
    return (x + 0.3 * rng.normal(size=x.shape)).astype(np.float32)

  return jax.tree.map_with_path(move, fresh), maps, words


def compose(variables, maps, words, train, key=1, **options):
  """Queries and the statistics after it."""

  @jax.jit  # Compiled as one, which is faster than an operation at a time.
  def apply(variables, maps, words):
    return val(**options).apply(
      variables, maps, words, MASK, train=train, method="compose",
      rngs={"dropout": jax.random.key(key)}, mutable=["batch_stats"],
    )  # fmt: skip

  return apply(variables, maps, words)


class ByHand:
  """The release's computation (nets/attention.py, nets/projection.py) in float64, without dropout,
  but for its zeros at padded words; loops over positions where it has convolutions."""

  def __init__(self, variables, train):
    as_float64 = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    self.params, self.stats = as_float64["params"], as_float64["batch_stats"]
    self.train = train

  def norm(self, x, params, stats):
    if self.train:
      axes = tuple(range(x.ndim - 1))
      mean, var = x.mean(axes), x.var(axes)
    else:
      mean, var = stats["mean"], stats["var"]
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]

  def unit(self, x, name, depth):
    p, s = self.params[depth][name], self.stats[depth][name]
    return np.maximum(self.norm(x @ p["conv"]["kernel"], p["bn"], s["bn"]), 0)

  def spatial(self, x, depth):
    """[batch, h, w]: each position sees the map through the kernel, centred on it."""
    p = self.params[depth]
    kernel = p["spatial_gate"]["kernel"][:, :, 0, 0]
    h, w = kernel.shape
    seen = np.zeros_like(x)
    for i in range(h):
      for j in range(w):
        for k in range(h):
          for m in range(w):
            # TensorFlow's 'SAME': of an even kernel the right half is the longer one.
            row, column = i + k - (h - 1) // 2, j + m - (w - 1) // 2
            if 0 <= row < h and 0 <= column < w:
              seen[:, i, j] += kernel[k, m] * x[:, row, column]
    normed = self.norm(seen[..., None], p["spatial_gate_bn"], self.stats[depth]["spatial_gate_bn"])
    return np.maximum(normed, 0)

  def attention(self, x, name, depth):
    flat = x.reshape(len(x), -1, x.shape[-1])
    q, r, v = (
      flat @ self.params[depth][name][what]["kernel"] for what in ("query", "key", "value")
    )
    e = np.exp(q @ r.transpose(0, 2, 1) / np.sqrt(x.shape[-1]))
    return (e / e.sum(-1, keepdims=True) @ v).reshape(x.shape)

  def level(self, image, text, depth):
    tiled = np.tile(text[:, None, None], (1, *image.shape[1:3], 1))
    x = self.unit(np.concatenate([image, tiled], -1), "fusion", depth)
    channels = self.unit(x.mean((1, 2)), "channel_gate", depth)[:, None, None]
    joint = 1 / (1 + np.exp(-channels)) * 1 / (1 + np.exp(-self.spatial(x.mean(-1), depth)))
    half = image.shape[-1] // 2
    heads = [
      self.attention(x[..., :half], "head0", depth), self.attention(x[..., half:], "head1", depth)
    ]  # fmt: skip
    attended = self.unit(np.concatenate(heads, -1), "attended", depth)
    p = self.params[depth]
    return (p["joint_weight"] * joint * image + p["self_weight"] * attended).mean((1, 2))

  def __call__(self, maps, words):
    unpadded = [w[:n] for w, n in zip(words.astype(np.float64), LENGTHS, strict=True)]
    pooled = np.stack([w.max(0) for w in unpadded])
    text = self.norm(
      pooled @ self.params["text_fc"]["kernel"], self.params["text_bn"], self.stats["text_bn"]
    )
    return [
      self.level(image.astype(np.float64), text, f"transformers_{k}")
      for k, image in enumerate(maps)
    ]


@pytest.fixture
def undropped(monkeypatch):
  """In training, nothing is dropped."""
  monkeypatch.setattr("crn_jax.models.composition.val._DROPOUT", 0.0)


@pytest.mark.parametrize("train", [False, True])
def test_it_computes_its_formulas(given, undropped, train):
  variables, maps, words = given
  with double_precision():
    as_float64 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (variables, maps[1:], words))
    found, _ = compose(*as_float64, train, dtype=jnp.float64)
  expected = ByHand(variables, train)(maps[1:], words)
  for query, by_hand in zip(found, expected, strict=True):
    # Some hundred roundings of 1e-16, of numbers below ten that small deviations divide.
    np.testing.assert_allclose(query, by_hand, rtol=0, atol=1e-12)


def test_targets_are_the_means_of_the_last_three_maps(given):
  _, maps, _ = given
  last = maps[-1] + 1  # As the last stage has a norm behind it.
  reference, targets = val().apply(
    {}, FeatureMaps(last, maps), train=False, method="image"
  )  # fmt: skip
  expected = (maps[1], maps[2], last)
  jax.tree.map(np.testing.assert_array_equal, reference, expected)
  for target, image_map in zip(targets, expected, strict=True):
    np.testing.assert_allclose(target, image_map.mean((1, 2)), atol=1e-6)


def test_a_backbone_of_two_stages_has_two_depths(given):
  _, maps, words = given
  features = FeatureMaps(maps[-1], maps[-2:])
  reference, targets = val().apply({}, features, train=False, method="image")
  variables = init(reference, words)
  queries, _ = compose(variables, reference, words, False)
  assert [x.shape for x in queries] == [x.shape for x in targets] == [(BATCH, 8), (BATCH, 10)]
  assert set(variables["params"]) == {"text_fc", "text_bn", "transformers_1", "transformers_2"}


def test_it_starts_with_the_gated_map_alone(given):
  """w_A = 0: what is attended to has no say yet, and a gate takes no more than three quarters."""
  _, maps, words = given
  fresh = init(maps[1:], words)
  for k in range(3):
    params = fresh["params"][f"transformers_{k}"]
    assert params["joint_weight"] == 1 and params["self_weight"] == 0
  positive = tuple(np.abs(x) for x in maps[1:])
  queries, _ = compose(fresh, positive, words, False)
  for query, image_map in zip(queries, positive, strict=True):
    share = query / image_map.mean((1, 2))
    assert np.all((share >= 0.25 - 1e-6) & (share < 1))


def untouched(grads) -> set[str]:
  """Names of what has no gradient but rounding, a millionth of the largest."""
  leaves = jax.tree.leaves_with_path(grads)
  largest = max(np.abs(g).max() for _, g in leaves)
  return {jax.tree_util.keystr(path) for path, g in leaves if np.abs(g).max() < 1e-6 * largest}


def test_a_gradient_reaches_every_parameter_the_maps_and_the_words(given):
  variables, maps, words = given

  def loss(params, maps, words):
    queries, _ = compose({**variables, "params": params}, maps, words, True)
    return sum(jnp.sum(jnp.square(q)) for q in queries)

  grads = jax.grad(loss, argnums=(0, 1, 2))(variables["params"], maps[1:], words)
  # A constant before BatchNorm is taken away by it.
  assert untouched(grads) == {"[0]['text_bn']['bias']"}


def test_at_its_start_a_gradient_reaches_all_but_the_attention_behind_w_a(given):
  _, maps, words = given
  fresh = init(maps[1:], words)

  def loss(params):
    queries, _ = compose({**fresh, "params": params}, maps[1:], words, True)
    return sum(jnp.sum(jnp.square(q)) for q in queries)

  without = untouched(jax.grad(loss)(fresh["params"])) - {"['text_bn']['bias']"}
  modules = {name.split("'")[3] for name in without}
  assert modules == {"head0", "head1", "attended"}
  assert len(without) == 3 * (2 * 3 + 3)


@pytest.mark.parametrize("train", [False, True])
def test_padding_has_no_influence(given, train):
  variables, maps, words = given
  other = np.where(MASK[..., None], words, 1e3).astype(np.float32)
  found, expected = (compose(variables, maps[1:], w, train)[0] for w in (other, words))
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_queries_and_statistics_do_not_depend_on_the_devices(given):
  variables, maps, words = given

  def apply(maps, words, mask, axis_name):
    return val(axis_name=axis_name).apply(
      variables, maps, words, mask, train=True, method="compose",
      rngs={"dropout": jax.random.key(3)}, mutable=["batch_stats"],
    )  # fmt: skip

  mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
  split = jax.jit(jax.shard_map(
    lambda *batch: apply(*batch, "data"), mesh=mesh, in_specs=P("data"),
    out_specs=(P("data"), P()), check_vma=False,
  ))(maps[1:], words, MASK)  # fmt: skip
  # Sums in another order, of float32 numbers below ten, through three BatchNorms.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), split,
    jax.jit(lambda *batch: apply(*batch, None))(maps[1:], words, MASK),
  )  # fmt: skip


def test_a_tenth_of_the_attention_is_dropped_in_training_and_the_mean_is_kept(given):
  """A head's result is linear in its attention: its mean over many draws is the undropped one."""
  variables, maps, _ = given
  head = SelfAttention()
  params = {"params": variables["params"]["transformers_0"]["head0"]}
  x = jnp.asarray(maps[1].reshape(BATCH, 16, 6)[..., :3])

  @jax.jit
  @jax.vmap
  def draw(key):
    return head.apply(params, x, train=True, rngs={"dropout": key})

  values = draw(jax.random.split(jax.random.key(0), 4000))
  whole = head.apply(params, x, train=False)
  error = np.std(values, axis=0) / np.sqrt(len(values))
  assert np.max(np.abs(np.mean(values, axis=0) - whole) / error) < 5  # Of 384 values.
  # Of a weight a, kept with 0.9 and divided by it, the variance is a^2 / 9.
  v = x @ params["params"]["value"]["kernel"]
  q, k = (x @ params["params"][name]["kernel"] for name in ("query", "key"))
  a = jax.nn.softmax(q @ k.swapaxes(1, 2) / np.sqrt(3))
  expected = jnp.square(a) @ jnp.square(v) / 9
  # The relative error of a variance of n draws is some sqrt(2 / n) = 0.022; more for few weights.
  np.testing.assert_allclose(np.var(values, axis=0), expected, rtol=0.25)
