"""Scores of pairs: DCNet's s_r + s_c of every query and image against its equations in NumPy."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from crn_jax import evaluate
from crn_jax.input_pipeline import images
from crn_jax.parallel import AXIS, DataParallel
from crn_jax.reports import cases
from crn_jax.retrieval import metrics, pairs
from crn_jax.retrieval.encode import Encoder
from tests import made_up, tiny_model
from tests.dcnet_by_hand import ByHand

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

KINDS = ("composed", "text_only")
# Of scores of up to two, sums of 112 products of numbers that some ten layers in float32 made: some
# roundings of 1e-7 (measured: 5e-7).
TOLERANCE = 2e-6


@dataclasses.dataclass(frozen=True)
class Given:
  config: object
  variables: dict
  split: object
  table: object

  @classmethod
  def make(cls, folder: pathlib.Path) -> "Given":
    config = tiny_model.config("dcnet,resnet50")
    config.model.feature_dim = 16
    config.data.update(image_size=56, resize=56)  # The last map is 7 x 7.
    config.eval.batch_size = 8
    config.eval.recall_at = (1, 10)
    split = made_up.split(folder)
    rng = np.random.default_rng(0)
    for path in split.image_paths:
      Image.fromarray(rng.integers(0, 256, (56, 56, 3), np.uint8)).save(path)
    return cls(config, tiny_model.variables(config), split, made_up.vocabulary(config))

  def encode(self, devices=None, mode: str = "shard_map"):
    """Vectors of the split, and what is added to the products of all queries, by kind."""
    parallel = DataParallel.create(mode, devices)
    encoder = Encoder.create(tiny_model.model(self.config, AXIS), parallel)
    found = encoder.encode(parallel.replicate(self.variables), self.split, self.table)
    return found, {kind: found.added[kind](np.arange(made_up.QUERIES)) for kind in KINDS}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  return Given.make(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def encoded(given):
  return given.encode(jax.devices()[:1])


@pytest.fixture(scope="module")
def by_hand(given):
  """kind -> s_r + s_c of every query and image, s_r alone, lengths of the queries: float64.

  Maps and words are those of the modules, which have tests of their own.
  """
  c, split = given.config, given.split
  method = tiny_model.model(c)
  params, stats = (given.variables[n]["single"] for n in ("params", "batch_stats"))
  pixels = [images.decode(path) for path in split.image_paths]
  tokens, mask = given.table.encode_all(split.queries.texts)

  @jax.jit
  def modules(pictures, tokens, mask):
    bound = method.model.bind({"params": params, "batch_stats": stats})
    return bound.backbone(pictures, train=False), bound.text(tokens, mask)

  pictures = method.preprocessing.normalize(np.stack(pixels))
  pictures = jnp.concatenate([pictures, jnp.zeros_like(pictures[:1])])
  maps, words = jax.device_get(modules(pictures, tokens, mask))
  hand = ByHand(jax.tree.map(np.float64, params["composition"]))
  *y, zero = [
    hand.image(np.float64(m[0]), np.float64(m[1]))
    for m in zip(maps.stages[-2], maps.map, strict=True)
  ]
  t = [hand.text(np.float64(w[m])) for w, m in zip(words, mask, strict=True)]
  references = {
    "composed": [y[r] for r in split.queries.reference],
    "text_only": [zero] * made_up.QUERIES,
  }
  found = {}
  for kind, x in references.items():
    scores = np.array(
      [[hand.scores(x_, t_, y_)[:2] for y_ in y] for x_, t_ in zip(x, t, strict=True)]
    )
    lengths = np.array([[hand.length(x_, t_)] for x_, t_ in zip(x, t, strict=True)])
    found[kind] = scores.sum(-1), scores[..., 0], lengths
  return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_ranked_is_the_sum_of_both_scores(kind, encoded, by_hand):
  vectors, added = encoded
  expected, s_r, lengths = by_hand[kind]
  products = getattr(vectors, kind) @ vectors.images.T
  within = {"rtol": 0, "atol": TOLERANCE}
  np.testing.assert_allclose(products * lengths, s_r, **within)
  np.testing.assert_allclose((products + added[kind]) * lengths, expected, **within)
  assert np.std(expected - s_r, axis=1).min() > 1000 * TOLERANCE  # Not the same for all images.


def test_ranks_and_pictures_are_those_of_the_sum(given, by_hand):
  """In every protocol, for every kind of query; images are shown with the scores they have."""
  parallel = DataParallel.create("shard_map", jax.devices()[:2])
  encoder = Encoder.create(tiny_model.model(given.config, AXIS), parallel)
  variables, data = parallel.replicate(given.variables), made_up.dataset(given.split)
  found = evaluate.evaluate(encoder, variables, data, given.table, 0, "last")
  outcomes, queries = found.outcomes["dress"], given.split.queries
  assert set(outcomes["val_split"]) == {"composed", "image_only", "text_only"}
  for protocol, gallery in given.split.galleries.items():
    for kind in {"composed", "text_only"} & set(outcomes[protocol]):
      both, alone = (ranks_of(scores, queries, gallery) for scores in by_hand[kind][:2])
      np.testing.assert_array_equal(outcomes[protocol][kind].ranks, both)
      assert np.any(both != alone)
  images = found.encoded["dress"].images
  of_images = ranks_of(images[queries.reference] @ images.T, queries, gallery[:-5])
  np.testing.assert_array_equal(outcomes["val_split"]["image_only"].ranks, of_images)
  shown = evaluate.cases(encoder, variables, given.table, given.split, found)
  scores, _, lengths = by_hand["composed"]
  for query in shown.chosen:
    positions, values = zip(*shown.top[int(query)], strict=True)
    gallery = [g for g in given.split.galleries["val_split"] if g != queries.reference[query]]
    order = sorted(gallery, key=lambda image, query=query: -scores[query, image])
    assert list(positions) == order[: cases.TOP]
    wanted = scores[query, list(positions)] / lengths[query]
    np.testing.assert_allclose(values, wanted, rtol=0, atol=TOLERANCE / lengths.min())


def ranks_of(scores, queries, gallery):
  """Rank of every query's target, without its reference. The scores of no two are near another."""
  scores = np.where(np.arange(scores.shape[1]) == queries.reference[:, None], -np.inf, scores)
  own = np.take_along_axis(scores, queries.target[:, None], axis=1)
  ranks = (scores[:, gallery] > own).sum(axis=1)
  return np.where(np.isin(queries.target, gallery), ranks, metrics.UNRANKED)


@pytest.mark.parametrize(("devices", "mode"), [(1, "shard_map"), (4, "shard_map"), (4, "pmap")])
def test_blocks_and_devices_do_not_matter(devices, mode, given, encoded, monkeypatch):
  """Several blocks of queries and of images, each with a ragged end."""
  monkeypatch.setattr(pairs, "_QUERIES", 3)
  monkeypatch.setattr(pairs, "_MAX_IMAGES", 7)
  _, expected = encoded
  _, found = given.encode(jax.devices()[:devices], mode)
  for kind in KINDS:
    # In units of the queries' length, which is 0.3.
    np.testing.assert_allclose(found[kind], expected[kind], rtol=0, atol=TOLERANCE / 0.2)


def test_rows_are_those_that_are_asked_for(encoded):
  vectors, added = encoded
  rows = np.array([7, 2, 19])
  np.testing.assert_allclose(
    vectors.added["composed"](rows), added["composed"][rows], rtol=0, atol=TOLERANCE / 0.2
  )
  assert vectors.added["composed"](rows[:0]).shape == (0, made_up.IMAGES)


@pytest.mark.parametrize("width", [128, 1024, 2048])
def test_a_block_needs_little_memory_however_wide(width):
  """Less than 256 MB for all pairs, and three products of width x width for each expert of one."""
  config = tiny_model.config("dcnet,resnet50")
  config.model.feature_dim = width
  method = tiny_model.model(config, AXIS)
  programs = pairs.PairScores.create(method, DataParallel.create("shard_map", jax.devices()[:1]))
  shape = jax.ShapeDtypeStruct
  variables = jax.eval_shape(tiny_model.model(config).init, jax.random.key(0))
  experts = shape((pairs._QUERIES, 7, width), jnp.float32)
  vectors = shape((10 * programs.images, method.vector_dim), jnp.float32)
  shared = (variables, vectors, shape((), jnp.int32))
  compiled = programs.score.lower(shared, (experts, experts)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 2**28
  least = 2 * 3 * 7 * width**2 * pairs._QUERIES * programs.images
  assert least < compiled.cost_analysis()["flops"] < 1.1 * least
