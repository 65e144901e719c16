"""Which program's weights these are, from names and shapes."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from crn_jax.convert import dual_encoder, huggingface, timm, torchvision
from crn_jax.errors import UserError

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kind:
  """A way to name the weights of a backbone.

  Attributes:
    name: for people.
    required: regular expressions; each matches the whole of some tensor's name.
    left_out: (regular expression of a whole name, why it is left out).
    rename: tensors -> tensors under the names of `load`.
    module: class of the backbone.
    load: tensors, source -> its arguments, its variables.
  """

  name: str
  required: tuple[str, ...]
  left_out: Sequence[tuple[str, str]]
  rename: Callable[[Tensors], dict]
  module: str
  load: Callable[[Tensors, str], tuple[dict, dict]]


_SWIN = r"layers\.\d+\.blocks\.\d+\.(attn|norm1|mlp)\..*"

# The first whose required names are all there.
KINDS = (
  Kind(
    "CLIP, names of transformers (Hugging Face); BGE-VL, too",
    (
      r"vision_model\.embeddings\.class_embedding",
      r"vision_model\.encoder\.layers\.0\..*",
      r"text_model\.encoder\.layers\.0\..*",
    ),
    dual_encoder.LEFT_OUT,
    dict,
    dual_encoder.MODULE,
    dual_encoder.load,
  ),
  Kind(
    "SigLIP or SigLIP 2, names of transformers (Hugging Face)",
    (
      r"vision_model\.head\.probe",
      r"vision_model\.encoder\.layers\.0\..*",
      r"text_model\.encoder\.layers\.0\..*",
    ),
    dual_encoder.LEFT_OUT,
    dict,
    dual_encoder.MODULE,
    dual_encoder.load,
  ),
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
    "ResNet, names of torchvision",
    (r"layer1\.0\.conv2\.weight", r"layer2\.0\.downsample\.0\.weight", r"bn1\.running_mean"),
    torchvision.LEFT_OUT,
    dict,
    "ResNet",
    torchvision.load,
  ),
)

# Models that have the names of a supported one, and more.
_LOOKALIKES = (
  (
    "a Swin Transformer V2",
    (r".*\.blocks\.\d+\..*\.(logit_scale|cpb_mlp\..*|continuous_position_bias_mlp\..*)",),
  ),
  ("one half of a CRN or CLVC-Net model; give both files", (r"(.*\.)?(local|global)_fuse\..*",)),
)
# Other models, so that a refusal can say what it is.
_UNSUPPORTED = (
  (
    "a CLIP with the names of OpenAI's release or of open_clip; give the model's folder with the "
    "names of transformers",
    (r"(.*\.)?visual\.transformer\.resblocks\.0\..*",),
  ),
  (
    "an image tower without its text tower; give the folder of the whole model",
    (
      r"(.*\.)?(vision_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight",
      r"(.*\.)?embeddings\.patch_embedding\.weight",
    ),
  ),
  (
    "a text tower without its image tower; give the folder of the whole model",
    (
      r"(.*\.)?(text_model\.)?encoder\.layers\.0\.self_attn\.q_proj\.weight",
      r"(.*\.)?embeddings\.token_embedding\.weight",
    ),
  ),
  ("a Vision Transformer (ViT)", (r"(.*\.)?cls_token", r".*patch_embed.*|.*embeddings.*")),
)
_CLASSIFIER = re.compile(r"(.*\.)?(head|classifier|fc)\..*")


def recognise(names: Iterable[str], source: str) -> tuple[Kind, str]:
  """The kind of weights, and what stands before all its names, e.g. 'module.' of DataParallel.

  Args:
    names: of the tensors.
    source: file that they come from, for messages.

  Raises:
    UserError: if it is none of `KINDS`, or several models; says what it looks like.
  """
  names = [name for name in names if len(name) < 1000]  # Longer ones take long to match.
  for what, required in _LOOKALIKES:
    if _has(names, required):
      raise UserError(_refusal(names, source, what))
  for kind in KINDS:
    prefixes = [p for p in _prefixes(names, kind) if _has(_under(p, names), kind.required)]
    if len(prefixes) > 1:
      what = f"several models, whose names begin with {', '.join(map(repr, prefixes))}"
      raise UserError(_refusal(names, source, what))
    if prefixes:
      return kind, prefixes[0]
  for what, required in _UNSUPPORTED:
    if _has(names, required):
      raise UserError(_refusal(names, source, what))
  if names and all(map(_CLASSIFIER.fullmatch, names)):
    raise UserError(_refusal(names, source, "a classifier alone, without its backbone"))
  raise UserError(_refusal(names, source, "no model that is known here"))


def split(
  tensors: Tensors, rules: Sequence[tuple[str, str]], prefix: str = ""
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The tensors that are wanted; the names of the others and why they are left out.

  Args:
    tensors: name -> tensor; only what is wanted is read.
    rules: (regular expression of a whole name after the prefix, why it is left out).
    prefix: what the names begin with; it is removed, and what does not begin so is left out.
  """
  wanted, left_out = {}, {}
  for full in tensors:
    name = full.removeprefix(prefix)
    reason = next((why for pattern, why in rules if re.fullmatch(pattern, name)), None)
    if not full.startswith(prefix):
      left_out[full] = f"not under {prefix!r}"
    elif reason:
      left_out[full] = reason
    else:
      wanted[name] = tensors[full]
  return wanted, left_out


def _has(names: Iterable[str], required: Sequence[str]) -> bool:
  return all(any(re.fullmatch(pattern, name) for name in names) for pattern in required)


def _prefixes(names: Iterable[str], kind: Kind) -> list[str]:
  """What may stand before the names of a kind."""
  pattern = re.compile(rf"((?:.*?\.)??){kind.required[0]}")
  return sorted({match[1] for match in map(pattern.fullmatch, names) if match})


def _under(prefix: str, names: Iterable[str]) -> list[str]:
  return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _refusal(names: Sequence[str], source: str, looks_like: str) -> str:
  kinds = "\n  ".join(kind.name for kind in KINDS)
  return (
    f"{source}: cannot be converted. It looks like {looks_like}: {len(names)} tensors, "
    f"{', '.join(sorted(names)[:3])} ... What can be converted:\n  {kinds}"
  )
