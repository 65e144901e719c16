"""Which program's weights these are, from names and shapes."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from crn_jax.convert import huggingface, timm, torchvision

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kind:
  """A way to name the weights of a backbone.

  Attributes:
    name: for people.
    signs: regular expressions; each matches the whole of some tensor's name.
    left_out: (regular expression of a whole name, why it is left out).
    rename: tensors -> tensors under the names of `load`.
    module: class of the backbone.
    load: tensors, source -> its arguments, its variables.
  """

  name: str
  signs: tuple[str, ...]
  left_out: Sequence[tuple[str, str]]
  rename: Callable[[Tensors], dict]
  module: str
  load: Callable[[Tensors, str], tuple[dict, dict]]


_SWIN = r"layers\.\d+\.blocks\.\d+\.(attn|norm1|mlp)\..*"

# The first whose signs are all there.
KINDS = (
  Kind(
    "Swin Transformer, names of transformers (Hugging Face)",
    (
      r"(swin\.)?embeddings\..*",
      r"(swin\.)?encoder\.layers\.\d+\.blocks\.\d+\.layernorm_before\..*",
    ),
    huggingface.LEFT_OUT,
    huggingface.timm_names,
    "SwinTransformer",
    timm.load,
  ),
  Kind(
    "Swin Transformer, names of Microsoft's release and of timm before 0.9",
    (_SWIN, r"layers\.0\.downsample\.reduction\.weight"),
    timm.LEFT_OUT,
    timm.modern_names,
    "SwinTransformer",
    timm.load,
  ),
  Kind(
    "Swin Transformer, names of timm",
    (_SWIN,),
    timm.LEFT_OUT,
    timm.modern_names,
    "SwinTransformer",
    timm.load,
  ),
  Kind(
    "ResNet with bottlenecks, names of torchvision",
    (r"layer1\.0\.conv3\.weight", r"layer1\.0\.downsample\.0\.weight"),
    torchvision.LEFT_OUT,
    dict,
    "ResNet",
    torchvision.load,
  ),
)

# What else people have, so that a refusal can say what it is.
_STRANGERS = (
  ("a Swin Transformer V2", (r".*\.attn\.(logit_scale|cpb_mlp\..*)",)),
  ("a Vision Transformer (ViT)", (r"(.*\.)?cls_token", r".*patch_embed.*|.*embeddings.*")),
  ("one half of a CRN or CLVC-Net model; give both files", (r"(local|global)_fuse\..*",)),
  ("a ResNet without bottlenecks", (r"layer1\.0\.conv1\.weight",)),
  ("a classifier alone, without its backbone", (r"(head|classifier|fc)\..*",)),
)


def recognise(tensors: Tensors, source: str) -> Kind:
  """The kind of weights.

  Raises:
    ValueError: if it is none of `KINDS`; says what it looks like.
  """
  for name, signs in _STRANGERS[:1]:
    if _has(tensors, signs):
      raise ValueError(_refusal(tensors, source, name))
  for kind in KINDS:
    if _has(tensors, kind.signs):
      return kind
  for name, signs in _STRANGERS:
    if _has(tensors, signs):
      raise ValueError(_refusal(tensors, source, name))
  raise ValueError(_refusal(tensors, source, "nothing known"))


def split(tensors: Tensors, rules: Sequence[tuple[str, str]]) -> tuple[dict, dict[str, str]]:
  """The tensors that are wanted; the names of the others and why they are left out."""
  left_out = {}
  for name in tensors:
    reason = next((why for pattern, why in rules if re.fullmatch(pattern, name)), None)
    if reason:
      left_out[name] = reason
  return {n: t for n, t in tensors.items() if n not in left_out}, left_out


def _has(tensors: Tensors, signs: Sequence[str]) -> bool:
  return all(any(re.fullmatch(sign, name) for name in tensors) for sign in signs)


def _refusal(tensors: Tensors, source: str, looks_like: str) -> str:
  kinds = "\n  ".join(kind.name for kind in KINDS)
  return (
    f"{source}: cannot be converted. It looks like {looks_like}: {len(tensors)} tensors, "
    f"{', '.join(sorted(tensors)[:3])} ... What can be converted:\n  {kinds}"
  )
