"""transformers' names of CLIP and SigLIP -> parameters of `crn_jax.models.dual_encoder`.

Sizes and preprocessing come from the files beside the weights; what these leave out has the default
of transformers' configuration classes.
"""

import contextlib
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from crn_jax.convert import layout, source
from crn_jax.errors import UserError
from crn_jax.input_pipeline.tokenizers import pretrained
from crn_jax.models.dual_encoder import DualEncoder, DualEncoderConfig

MODULE = "DualEncoder"
# model_type of config.json -> class of transformers that knows its fields. SigLIP 2 of a fixed
# resolution calls itself 'siglip', that of any resolution 'siglip2'.
_CONFIGS = {"clip": "CLIPConfig", "siglip": "SiglipConfig", "siglip2": "Siglip2Config"}
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers.
_OLD_END = 2  # eos_token_id of CLIP's first configurations, which is not the end of a text.

LEFT_OUT = (
  (r"(.*\.)?position_ids", "constant, 0, 1, 2, ..."),
  (r"logit_scale|logit_bias", "of the loss that the towers were trained with"),
)

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Flax's names, joined by dots, -> transformers'; applied in this order.
_RULES = (
  (r"^image_projection\.", "visual_projection."),
  (r"^text\.", "text_model."),
  (r"^image\.", "vision_model."),
  (r"\.encoder\.blocks\.", ".encoder.layers."),
  (r"\.class_embedding$", ".embeddings.class_embedding"),
  (r"\.position_embedding$", ".embeddings.position_embedding.weight"),
  (r"\.patch_embed\.", ".embeddings.patch_embedding."),
  (r"\.embedding\.", ".embeddings.token_embedding."),
  (r"\.pre_norm\.", ".pre_layrnorm."),  # So they are called.
  (r"\.post_norm\.", ".post_layernorm."),
  (r"\.final_norm\.", ".final_layer_norm."),
  (r"\.norm([12])\.", r".layer_norm\1."),
  (r"\.(qkv|q_proj)\.", r".self_attn.\1."),
  (r"\.pool\.probe$", ".head.probe"),
  (r"\.pool\.(query|key_value)\.", r".head.attention.\1."),
  (r"\.pool\.proj\.", ".head.attention.out_proj."),
  (r"\.pool\.norm\.", ".head.layernorm."),
  (r"\.pool\.mlp\.", ".head.mlp."),
  (r"\.proj\.", ".self_attn.out_proj."),
)


def transformers_name(path: tuple[str, ...], family: str) -> str:
  """Name in transformers of a parameter, of one block; fused ones as `fuse` calls them.

  Args:
    path: Flax path, the block's number behind 'blocks', e.g. ('text', 'encoder', 'blocks', '3',
      'qkv', 'kernel').
    family: 'clip' or 'siglip'.

  Returns:
    E.g. 'text_model.encoder.layers.3.self_attn.qkv.weight'.
  """
  *modules, leaf = path
  name = ".".join((*modules, _LEAVES.get(leaf, leaf)))
  if family == "siglip":
    name = re.sub(r"^text_projection\.", "text_model.head.", name)
  for pattern, replacement in _RULES:
    name = re.sub(pattern, replacement, name)
  return name


def fuse(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Joins the blocks' query, key and value, and splits those of the attention pooling.

  PyTorch's fused matrix of the pooling holds them in this order. Parts that are missing or do not
  fit leave the others under their own names, so that the check against the model names them.
  """
  tensors = dict(state_dict)
  for name in [n for n in tensors if ".self_attn.q_proj." in n]:
    parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
    if all(p in tensors and tensors[p].shape == tensors[name].shape for p in parts):
      tensors[name.replace("q_proj", "qkv")] = np.concatenate([tensors.pop(p) for p in parts])
  for leaf in ("weight", "bias"):
    fused = tensors.get(f"vision_model.head.attention.in_proj_{leaf}")
    if fused is not None and fused.shape[0] % 3 == 0:
      del tensors[f"vision_model.head.attention.in_proj_{leaf}"]
      width = fused.shape[0] // 3
      tensors[f"vision_model.head.attention.query.{leaf}"] = fused[:width]
      tensors[f"vision_model.head.attention.key_value.{leaf}"] = fused[width:]
  return tensors


def load(state_dict: Mapping[str, np.ndarray], file: str) -> tuple[dict, dict]:
  """The towers, whose sizes stand beside their weights.

  Args:
    state_dict: transformers' names -> arrays.
    file: that the weights come from; in its folder are config.json and preprocessor_config.json.

  Returns:
    The description, see `DualEncoderConfig.to_dict`; variables {'params'}, float32.

  Raises:
    UserError: if these files are missing or describe other towers than can be computed; if weights
      are missing, left over, or of another size than they say. Names them.
  """
  config = read_config(pathlib.Path(file).parent)
  return config.to_dict(), {"params": to_params(config, state_dict, file)}


def to_params(config: DualEncoderConfig, state_dict: Mapping[str, np.ndarray], file: str) -> dict:
  """Parameters of the towers, see `load`."""
  module = DualEncoder(config)
  side, length = config.image.image_size, config.text.length
  shapes = (
    jax.ShapeDtypeStruct((1, side, side, 3), np.float32),
    jax.ShapeDtypeStruct((1, length), np.int32),
  )
  like = jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args)["params"], *shapes)
  stacked = traverse_util.flatten_dict(like)
  flat = {}  # With one array a block, as the file has them.
  for path, value in stacked.items():
    if "blocks" in path:
      at = path.index("blocks") + 1
      one = jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
      flat |= {(*path[:at], str(i), *path[at:]): one for i in range(value.shape[0])}
    else:
      flat[path] = value
  names = {path: transformers_name(path, config.family) for path in flat}
  filled = layout.fill(flat, names, fuse(state_dict), file, f"{config.family} of its config.json")
  params = {}
  for path in stacked:
    if "blocks" in path:
      at = path.index("blocks") + 1
      depth = stacked[path].shape[0]
      params[path] = np.stack([filled.pop((*path[:at], str(i), *path[at:])) for i in range(depth)])
    else:
      params[path] = filled[path]
  return traverse_util.unflatten_dict(params)


def read_config(folder: pathlib.Path) -> DualEncoderConfig:
  """The description of the towers in a Hugging Face folder.

  Raises:
    UserError: a file is missing, or says what cannot be computed; names the field.
  """
  path = folder / "config.json"
  if not path.is_file():
    raise UserError(
      f"{path}: not found; the sizes of the towers stand there. Give the whole folder of the model"
    )
  content = source.read_json(path)
  model_type = content.get("model_type")
  if model_type not in _CONFIGS:
    raise UserError(
      f"{path}: a model of type {model_type!r}; expected one of {', '.join(map(repr, _CONFIGS))}"
    )
  with _naming(path):
    config = getattr(pretrained.transformers_library(), _CONFIGS[model_type]).from_dict(content)
    family = "clip" if model_type == "clip" else "siglip"
    image = _image_tower(config.vision_config, family)
    found = {
      "family": family,
      "image": image,
      "text": _text_tower(config.text_config, family),
      "vector_dim": config.projection_dim if family == "clip" else config.vision_config.hidden_size,
      "project_image": family == "clip",
      "project_text": True,
      "project_bias": family == "siglip",
      **read_preprocessing(folder, model_type, image["image_size"]),
    }
    if family == "siglip" and not getattr(config.vision_config, "vision_use_head", True):
      raise UserError("vision_config.vision_use_head is false, so that images have no vector")
    text_dim = getattr(config.text_config, "projection_size", found["vector_dim"])
    if text_dim != found["vector_dim"]:
      raise UserError(
        f"texts have vectors of {text_dim}, images of {found['vector_dim']}: no pair of towers"
      )
    return DualEncoderConfig.from_dict(found)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  except Exception as error:  # transformers checks fields in its own ways.
    raise UserError(
      f"{path}: not a configuration that transformers can read ({type(error).__name__}: "
      f"{' '.join(str(error).split())})"
    ) from error


def _sizes(config) -> dict[str, Any]:
  return {
    "width": config.hidden_size,
    "depth": config.num_hidden_layers,
    "heads": config.num_attention_heads,
    "mlp_dim": config.intermediate_size,
    "activation": config.hidden_act,
    "epsilon": config.layer_norm_eps,
  }


def _image_tower(config, family: str) -> dict[str, Any]:
  if config.num_channels != 3:
    raise UserError(f"vision_config.num_channels is {config.num_channels}; expected 3")
  size = getattr(config, "image_size", None)
  if size is None:  # Of any resolution: that of the table of positions, which is square.
    size = math.isqrt(config.num_patches) * config.patch_size
  for name, value in (("image_size", size), ("patch_size", config.patch_size)):
    if not isinstance(value, int):
      raise UserError(f"vision_config.{name} is {value}; expected one integer, of squares")
  pooling = "class_token" if family == "clip" else "attention"
  own = {"patch_size": config.patch_size, "image_size": size, "pooling": pooling}
  return _sizes(config) | own


def _text_tower(config, family: str) -> dict[str, Any]:
  end = config.eos_token_id
  if family == "siglip":
    pooling, end = "last", -1  # Its id is not looked at.
  elif end == _OLD_END:
    pooling = "largest_id"
  elif isinstance(end, int):
    pooling = "end"
  else:
    raise UserError(f"text_config.eos_token_id is {end}; expected one integer")
  own = {"vocab_size": config.vocab_size, "length": config.max_position_embeddings}
  return _sizes(config) | own | {"pooling": pooling, "end_id": end}


def read_preprocessing(folder: pathlib.Path, model_type: str, side: int) -> dict[str, Any]:
  """How pictures are prepared, see `Preprocessing`.

  Args:
    folder: of the model.
    model_type: of its config.json; what the preprocessing leaves out is as of its image processor.
    side: of the pictures that the image tower takes, in pixels.

  Raises:
    UserError: if no file says it, or what it says cannot be done; names the field.
  """
  path = folder / "preprocessor_config.json"
  content = source.read_json(path)
  if not content:  # transformers 5 writes it into the settings of the whole processor.
    content = source.read_json(folder / "processor_config.json").get("image_processor") or {}
  if lacking := [name for name in ("image_mean", "image_std") if name not in content]:
    raise UserError(
      f"{path}: {' and '.join(lacking)} not found; how pictures are normalised stands there. Give "
      f"the whole folder of the model"
    )
  for name in ("image_mean", "image_std"):
    value = content[name]
    numbers = isinstance(value, list) and all(isinstance(x, (int, float)) for x in value)
    if not numbers or len(value) != 3 or (name == "image_std" and min(value) <= 0):
      raise UserError(f"{path}: {name} is {json.dumps(value)}; expected three numbers")
  if (resample := content.get("resample")) not in _RESAMPLING:
    raise UserError(
      f"{path}: resample is {resample}; expected 2 (bilinear) or 3 (bicubic), Pillow's numbers"
    )
  for name in ("do_resize", "do_rescale", "do_normalize"):
    if content.get(name) is False:
      raise UserError(f"{path}: {name} is false; expected true, as it is always done here")
  found = {
    "mean": tuple(content["image_mean"]),
    "std": tuple(content["image_std"]),
    "interpolation": _RESAMPLING[resample],
  }
  # 'siglip2' keeps the shape of pictures, which are no squares then; ours are their middle.
  squeeze = model_type != "siglip2" and _squeezes(content, model_type == "clip", side, str(path))
  return found | {"squeeze": squeeze}


def _squeezes(content: Mapping[str, Any], crops: bool, side: int, path: str) -> bool:
  """Whether pictures are resized to a square of `side` pixels, or by their short side to it.

  Args:
    content: of preprocessor_config.json.
    crops: whether the middle is cut out unless it says so.
    side: of the pictures that the image tower takes, in pixels.
    path: for messages.
  """
  said = content.get("do_center_crop")
  crops = crops if said is None else said
  size = content.get("size")
  if size is None:
    size = {"shortest_edge": side} if crops else {"height": side, "width": side}
  elif isinstance(size, int):  # As the first files have it.
    size = {"shortest_edge": size}
  size = {k: v for k, v in size.items() if v is not None} if isinstance(size, Mapping) else size
  fits = {True: {"height": side, "width": side}, False: {"shortest_edge": side}}
  if size not in fits.values():
    raise UserError(
      f"{path}: size is {json.dumps(size)}; expected {json.dumps(fits[True])}, which squeezes "
      f"pictures into a square, or {json.dumps(fits[False])} with a crop: the image tower takes "
      f"{side} pixels. For a crop of larger pictures write that here, and set data.resize in a run"
    )
  squeeze = size == fits[True]
  if not crops and not squeeze:
    raise UserError(
      f"{path}: size is {json.dumps(size)} and do_center_crop {json.dumps(said)}, so that pictures "
      f"would be no squares; expected a crop, or size {json.dumps(fits[True])}"
    )
  crop = content.get("crop_size")
  if crops and crop not in (None, side, fits[True]):
    raise UserError(
      f"{path}: crop_size is {json.dumps(crop)}; expected {json.dumps(fits[True])}, as the image "
      f"tower takes {side} pixels"
    )
  return squeeze


def tokenizer_files(file: pathlib.Path) -> dict[str, pathlib.Path]:
  """Name beside our weights -> file beside the given ones, of the towers' tokenizer.

  Raises:
    UserError: if there is none.
  """
  folder = file.parent
  pretrained.check_files(folder)
  names = pretrained.found_files(folder)
  return {f"{pretrained.FOLDER}/{name}": folder / name for name in names}


def describe(arguments: Mapping[str, Any]) -> str:
  """The towers in a line, for people."""
  c = DualEncoderConfig.from_dict(arguments)
  return (
    f"image tower: {c.image.depth} blocks of {c.image.width}, {c.image.image_size} px in patches "
    f"of {c.image.patch_size}; text tower: {c.text.depth} blocks of {c.text.width}, "
    f"{c.text.length} of {c.text.vocab_size:,} tokens; vectors of {c.vector_dim}"
  )
