"""Vectors of a split against the branches applied to one query at a time."""

import jax
import numpy as np
import pytest

from crn_jax.input_pipeline import images
from crn_jax.methods.crn import CRN
from crn_jax.models.crn import BRANCHES, Branch
from crn_jax.models.preprocessing import IMAGENET
from crn_jax.parallel import AXIS, DataParallel
from crn_jax.retrieval.encode import Encoder
from tests import made_up, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

# Of unit vectors; batches of another size are summed in another order (measured: 2e-7).
TOLERANCE = 2e-6


def unit(*vectors):
  """Each vector normalised, joined, and normalised again, in float64."""
  joined = np.concatenate([v / np.linalg.norm(v) for v in np.asarray(vectors, np.float64)])
  return joined / np.linalg.norm(joined)


@pytest.mark.parametrize("preset", ["crn", "crn_released"])
def test_every_vector_is_that_of_its_own_image_and_text(preset, tmp_path):
  """Images shared by queries, several batches of both, a ragged end of both."""
  config = tiny_model.config(preset)
  config.data.resize = 40
  config.eval.batch_size = 8
  variables = tiny_model.variables(config)
  split, table = made_up.split(tmp_path), made_up.vocabulary(config)
  split.queries.reference[5:12] = 3  # More queries of one image than a batch holds.
  parallel = DataParallel.create("shard_map")
  encoder = Encoder.create(tiny_model.model(config, AXIS), parallel)
  found = encoder.encode(parallel.replicate(variables), split, table)
  branches = CRN(config, tiny_model.VOCAB_SIZE).branches
  own = {kind: {c: tree[kind] for c, tree in variables.items()} for kind in BRANCHES}

  @jax.jit
  def of_image(picture):
    return {
      kind: branch.apply(own[kind], picture, train=False, method=Branch.encode_image)
      for kind, branch in branches.items()
    }

  @jax.jit
  def of_query(maps, tokens, mask):
    out = {}
    for kind, branch in branches.items():
      zero = branch.apply(own[kind], 32, 32, method=Branch.encode_zero_image).map
      words = branch.apply(own[kind], tokens, mask, method=Branch.encode_text)
      out[kind] = [
        branch.apply(own[kind], m, *words, train=False, method=Branch.compose).vector
        for m in (maps[kind], zero)
      ]
    return out

  def picture(row):
    pixels = images.resize_short_side(images.decode(split.image_paths[row]), 40)
    return IMAGENET.normalize(images.center_crop(pixels, 32)[None])

  for row in range(len(split.image_paths)):
    out = of_image(picture(row))
    vectors = [out[kind].vector[0] for kind in BRANCHES]
    np.testing.assert_allclose(found.images[row], unit(*vectors), rtol=0, atol=TOLERANCE)
  for query, texts in enumerate(split.queries.texts):
    maps = {k: o.map for k, o in of_image(picture(split.queries.reference[query])).items()}
    tokens, mask = table.encode(texts)
    out = of_query(maps, tokens[None], mask[None])
    for name, i in (("composed", 0), ("text_only", 1)):
      expected = unit(*(out[kind][i][0] for kind in BRANCHES))
      np.testing.assert_allclose(getattr(found, name)[query], expected, rtol=0, atol=TOLERANCE)
  assert np.abs(found.composed - found.text_only).max() > 100 * TOLERANCE
