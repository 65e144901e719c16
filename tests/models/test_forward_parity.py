"""The eval-mode forward of both branches against the PyTorch release.

Bound: 1e-5 of the largest value of each array, in float32 on a CPU.
"""

import numpy as np
import pytest

from crn_jax.methods.crn import CRN
from crn_jax.models import crn
from tests import release

TOLERANCE = 1e-5
GOLDENS = np.load(release.GOLDENS / "forward_eval.npz")
IDS = GOLDENS["token_ids"].astype(np.int32)


@pytest.fixture(scope="module", params=crn.BRANCHES)
def forward(request):
  """All intermediate values of one branch, by golden name."""
  kind = request.param
  branch = CRN(release.config(), release.VOCAB_SIZE).branches[kind]
  variables = release.variables(kind, branch)
  bound = branch.bind(variables)
  values = {}
  for name in ("src", "tgt"):
    images = release.nhwc(f"eval.{name}", (3, 3, 64, 64))
    features = bound.backbone(images, train=False)
    out = bound.head(features)
    values[f"{name}.pooled"] = features.map.mean((1, 2))
    values[f"{name}.imgs"] = out.map
    values[f"{name}.img_feature"] = out.vector
    if name == "src":
      values["imgs_final"] = out.aggregated
      for i, stage in enumerate(features.stages):
        values[f"stage{i}"] = stage.reshape(3, -1, stage.shape[-1])
        if i in (1, 2):
          values[f"stage{i}_mean"] = stage.mean((1, 2))
      source = out
  words, mask = bound.encode_text(IDS, IDS >= 0)
  query = bound.compose(source.map, words, mask, train=False)
  values["lstm"], values["lstm_first8"] = words, words[..., :8]
  composed = np.asarray(query.composed)
  values["fuse_out"] = composed if kind == "local" else composed.swapaxes(1, 2)
  values["attn"] = query.attention.reshape(3, IDS.shape[1], -1)
  values["pooled_fuse"] = bound.query_pool(query.composed)
  values["query_feature"] = query.vector
  values["fusdiff"] = bound.relation(query.vector, values["tgt.img_feature"])
  zero = bound.encode_zero_image(64, 64)
  values["zero_query_feature"] = bound.compose_zero_image(zero.map, words, mask, train=False)
  alone = IDS[1:2, : GOLDENS["token_lengths"][1]]
  words, mask = bound.encode_text(alone, alone >= 0)
  values["query1_alone"] = bound.compose(source.map[1:2], words, mask, train=False).vector
  return kind, values


@pytest.mark.parametrize(
  "name",
  sorted({k.split(".", 1)[1].split("#")[0] for k in GOLDENS.files if k.startswith("local.")}),
)
def test_every_intermediate_value_equals_the_release(forward, name):
  kind, values = forward
  assert release.distance(GOLDENS, f"{kind}.{name}", values[name]) < TOLERANCE
