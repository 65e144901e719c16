"""Concatenation, TIRG and FiLM against their formulas in NumPy, float64; evaluation.

Tolerance: 1e-5 of the largest value. Sums have at most a few hundred float32 terms, each rounded to
6e-8 of itself.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from crn_jax.models.backbones.feature_maps import FeatureMaps
from crn_jax.models.backbones.resnet import BOTTLENECK, Block, ResNet
from crn_jax.models.composition import base, concat, film, image_only, text_only, tirg

BATCH, D, CHANNELS, SIDE, WORDS = 3, 8, 32, 4, 5
CONFIG = ml_collections.FrozenConfigDict({"feature_dim": D})
LENGTHS = np.array([2, 5, 3])


@pytest.fixture(scope="module")
def given():
  """Maps of reference and target, words, their mask."""
  rng = np.random.default_rng(0)
  maps = rng.normal(size=(2, BATCH, SIDE, SIDE, CHANNELS)).astype(np.float32)
  words = rng.normal(size=(BATCH, WORDS, D)).astype(np.float32)
  return *maps, words, np.arange(WORDS) < LENGTHS[:, None]


class Whole(base.nn.Module):
  """Reference map, words -> query; target map -> vector."""

  kind: type[base.Composition]

  def setup(self):
    self.backbone = ResNet(width=4, depths=(1, 1))
    self.composition = self.kind(CONFIG, self.backbone)

  def __call__(self, reference, target, words, mask):
    maps = [FeatureMaps(m, (m, m)) for m in (reference, target)]
    (kept, _), (_, vectors) = (self.composition.image(m, train=False) for m in maps)
    return self.composition.compose(kept, words, mask, train=False), vectors


def run(kind, given):
  """Made-up parameters in float64; query and target vector."""
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(lambda: Whole(kind).init(jax.random.key(0), *given))

  def value(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    return np.abs(noise) + 0.5 if path[-1].key == "var" else 0.3 * noise

  variables = jax.tree_util.tree_map_with_path(value, shapes)
  (query,), (target,) = jax.jit(Whole(kind).apply)(variables, *given)
  own = {c: tree.get("composition", {}) for c, tree in variables.items()}
  return jax.tree.map(lambda x: np.asarray(x, np.float64), own), query, target


def close(found, expected):
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def dense(p, x):
  return x @ p["kernel"] + p["bias"]


def batch_norm(own, name, x):
  """Of running statistics; `name` is a path."""
  p, s = own["params"], own["batch_stats"]
  for part in name:
    p, s = p[part], s[part]
  return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def relu(x):
  return np.maximum(x, 0)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def vectors(own, given):
  """i, t and the target's vector."""
  reference, target, words, _ = (np.asarray(x, np.float64) for x in given)
  last = np.stack([words[n, length - 1] for n, length in enumerate(LENGTHS)])
  p = own["params"]
  image = [dense(p["image_vector"]["fc"], m.mean((1, 2))) for m in (reference, target)]
  return image[0], dense(p["text_vector"]["fc"], last) if "text_vector" in p else None, image[1]


def test_image_and_text_alone(given):
  own, query, target = run(image_only.ImageOnly, given)
  close(query, vectors(own, given)[0])
  close(target, vectors(own, given)[2])
  own, query, target = run(text_only.TextOnly, given)
  close(query, vectors(own, given)[1])
  close(target, vectors(own, given)[2])


def test_concatenation(given):
  own, query, _ = run(concat.Concat, given)
  i, t, _ = vectors(own, given)
  p = own["params"]
  assert p["hidden"]["kernel"].shape == (2 * D, 2 * D)
  x = dense(p["hidden"], relu(batch_norm(own, ("bn_in",), np.concatenate([i, t], -1))))
  close(query, dense(p["out"], relu(batch_norm(own, ("bn_hidden",), x))))


def test_tirg(given):
  own, query, target = run(tirg.TIRG, given)
  i, t, y = vectors(own, given)
  c, p = np.concatenate([i, t], -1), own["params"]
  gate = dense(p["gate"]["out"], relu(batch_norm(own, ("gate", "bn"), c)))
  residual = relu(dense(p["residual"]["hidden"], relu(batch_norm(own, ("residual", "bn"), c))))
  residual = dense(p["residual"]["out"], residual)
  close(query, p["weights"][0] * sigmoid(gate) * i + p["weights"][1] * residual)
  close(target, y)


def convolution(p, x):
  """3 x 3, zeros around."""
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  h, w = x.shape[1:3]
  return p["bias"] + sum(
    padded[:, a : a + h, b : b + w] @ p["kernel"][a, b] for a in range(3) for b in range(3)
  )


def test_tirg_on_the_map(given):
  own, query, target = run(tirg.TIRGMap, given)
  _, t, y = vectors(own, given)
  reference, p = np.asarray(given[0], np.float64), own["params"]
  tiled = np.broadcast_to(t[:, None, None], (BATCH, SIDE, SIDE, D))
  c = np.concatenate([reference, tiled], -1)

  def branch(name):
    x = relu(convolution(p[name]["hidden"], batch_norm(own, (name, "bn"), c)))
    return convolution(p[name]["out"], x)

  a = p["weights"]
  composed = a[0] * sigmoid(branch("gate")) * reference + a[1] * branch("residual")
  close(query, dense(p["image_vector"]["fc"], composed.mean((1, 2))))
  close(target, y)


class TestFiLM:
  """gamma = 1 + linear(t) and beta = linear(t), after each block of the last stages."""

  DEPTHS = (1, 2, 1)

  def variables(self, method):
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(lambda: method().init(jax.random.key(0), *self.inputs()))
    return jax.tree.map(
      lambda s: np.abs(rng.normal(size=s.shape)).astype(np.float32) * 0.1 + 0.1, shapes
    )

  def inputs(self):
    rng = np.random.default_rng(3)
    return (
      rng.normal(size=(BATCH, 32, 32, 3)).astype(np.float32),
      rng.normal(size=(BATCH, WORDS, D)).astype(np.float32),
      np.arange(WORDS) < LENGTHS[:, None],
    )

  def module(self):
    depths = self.DEPTHS

    class Model(base.nn.Module):
      def setup(self):
        self.backbone = ResNet(width=4, depths=depths)
        self.composition = film.FiLM(CONFIG, self.backbone)

      def __call__(self, images, words, mask):
        features = self.backbone(images, train=False)
        reference, (target,) = self.composition.image(features, train=False)
        return features, target, self.composition.compose(reference, words, mask, train=False)[0]

    return Model()

  def test_without_modulation_the_query_is_the_image(self):
    variables = self.variables(self.module)
    p = variables["params"]["composition"]
    p["modulation"] = jax.tree.map(np.zeros_like, p["modulation"])
    _, target, query = jax.jit(self.module().apply)(variables, *self.inputs())
    close(query, np.asarray(target))

  def test_each_block_of_the_last_stages_has_its_own_channels(self):
    """By hand: block after block, each alone, modulated between."""
    images, words, mask = self.inputs()
    variables = self.variables(self.module)
    features, _, query = jax.jit(self.module().apply)(variables, images, words, mask)
    p = variables["params"]["composition"]
    last = np.stack([words[n, length - 1] for n, length in enumerate(LENGTHS)])
    text = dense(p["text_vector"]["fc"], last)
    widths = [32, 32, 64]
    both = dense(p["modulation"], text)
    assert both.shape[-1] == 2 * sum(widths)
    gammas, betas = np.split(both, 2, axis=-1)
    x, first = features.stages[0], 0
    backbone = {c: tree["backbone"] for c, tree in variables.items()}
    for stage, blocks in ((1, 2), (2, 1)):
      for block in range(blocks):
        name = f"stage{stage}_block{block}"
        x = one_block(backbone, name, 4 * 2**stage, 2 if block == 0 else 1, block == 0, x)
        width = x.shape[-1]
        gamma, beta = (v[:, None, None, first : first + width] for v in (gammas, betas))
        x, first = (1 + gamma) * x + beta, first + width
    close(query, dense(p["image_vector"]["fc"], np.asarray(x).mean((1, 2))))


def one_block(backbone, name, width, stride, project, x):
  own = {c: tree[name] for c, tree in backbone.items()}
  return Block(width, BOTTLENECK, stride, project).apply(own, jnp.asarray(x), False)
