"""A small Swin backbone's weights under the names that files have."""

import jax
import numpy as np
from flax import traverse_util

from crn_jax.convert import timm
from crn_jax.models.backbones import swin

ARGUMENTS = {
  "embed_dim": 8,
  "depths": (1, 2),
  "num_heads": (1, 2),
  "patch_size": 4,
  "window_size": 2,
}


def params(side: int = 16, **arguments) -> dict:
  """Made-up parameters."""
  module = swin.SwinTransformer(**ARGUMENTS | arguments)
  shapes = jax.eval_shape(
    lambda x: module.init(jax.random.key(0), x, train=False)["params"], np.zeros((1, side, side, 3))
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def timm_state_dict(tree: dict) -> dict[str, np.ndarray]:
  """timm's names and layouts (the inverse of the conversion)."""
  out = {}
  for path, value in traverse_util.flatten_dict(tree).items():
    if path == ("patch_embed", "kernel"):
      value = value.reshape(4, 4, 3, 8).transpose(3, 2, 0, 1)
    elif path[-1] == "kernel":
      value = value.T
    out[timm.timm_name(path)] = np.ascontiguousarray(value)
  return out


def old_timm_state_dict(tree: dict) -> dict[str, np.ndarray]:
  """As timm before 0.9 and Microsoft wrote it: with constants and the classifier."""
  out = {
    name.replace("layers.1.downsample", "layers.0.downsample"): value
    for name, value in timm_state_dict(tree).items()
  }
  out["layers.0.blocks.0.attn.relative_position_index"] = np.zeros((4, 4), np.int64)
  out["layers.1.blocks.1.attn_mask"] = np.zeros((4, 4, 4), np.float32)
  out["head.weight"] = np.zeros((3, 16), np.float32)
  return out


def huggingface_state_dict(tree: dict, prefix: str = "swin.") -> dict[str, np.ndarray]:
  """As published by Hugging Face: query, key and value apart."""
  out = {}
  for name, value in timm_state_dict(tree).items():
    name = name.replace("layers.1.downsample", "layers.0.downsample")
    for mine, theirs in (
      ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
      ("patch_embed.norm", "embeddings.norm"),
      ("layers.", "encoder.layers."),
      ("norm1", "layernorm_before"),
      ("norm2", "layernorm_after"),
      ("mlp.fc1", "intermediate.dense"),
      ("mlp.fc2", "output.dense"),
      ("attn.proj", "attention.output.dense"),
      ("attn.", "attention.self."),
    ):
      name = name.replace(mine, theirs)
    if name.startswith("norm."):
      name = "layer" + name
    if ".qkv." in name:
      for part, piece in zip(("query", "key", "value"), np.split(value, 3), strict=True):
        out[prefix + name.replace("qkv", part)] = piece
    else:
      out[prefix + name] = value
  out["classifier.weight"] = np.zeros((3, 16), np.float32)
  return out
