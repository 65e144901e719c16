"""Names of `transformers`' Swin weights -> today's names of timm."""

import re
from collections.abc import Mapping

import numpy as np

from crn_jax.convert import timm

LEFT_OUT = ((r"classifier\..*", "classifier"), *timm.LEFT_OUT)

# Published files have the first of two alternatives, memory of transformers 5 the second.
_RULES = (
  (r"^swin\.", ""),
  (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
  (r"^embeddings\.norm\.", "patch_embed.norm."),
  (r"^encoder\.", ""),
  (r"\.attention\.self\.(relative_position\w+)$", r".attn.\1"),
  (r"\.attention\.relative_position_bias\.", ".attn."),
  (r"\.attention\.output\.dense\.|\.attention\.o_proj\.", ".attn.proj."),
  (r"\.attention\.self\.(query|key|value)\.", r".attn.\1."),
  (r"\.attention\.q_proj\.", ".attn.query."),
  (r"\.attention\.k_proj\.", ".attn.key."),
  (r"\.attention\.v_proj\.", ".attn.value."),
  (r"\.layernorm_before\.", ".norm1."),
  (r"\.layernorm_after\.", ".norm2."),
  (r"\.intermediate\.dense\.", ".mlp.fc1."),
  (r"(\.blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
  (r"^layernorm\.", "norm."),
)


def timm_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames, and fuses query, key and value into one matrix.

  A part of the three that is missing leaves the others under their own names, so that the check
  against the model names it.
  """
  renamed = {}
  for name, tensor in state_dict.items():
    for pattern, replacement in _RULES:
      name = re.sub(pattern, replacement, name)
    renamed[name] = tensor
  for name in [n for n in renamed if ".attn.query." in n]:
    parts = [name.replace("query", part) for part in ("query", "key", "value")]
    if all(p in renamed and renamed[p].shape[1:] == renamed[name].shape[1:] for p in parts):
      fused = np.concatenate([renamed.pop(p) for p in parts])
      renamed[name.replace("query", "qkv")] = fused
  return timm.modern_names(renamed)
