"""What a configuration takes from the folder of pretrained towers that it names."""

import pathlib
from collections.abc import Iterable

import ml_collections

from crn_jax.errors import UserError
from crn_jax.input_pipeline.tokenizers import pretrained
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.input_pipeline.tokenizers.pretrained import PretrainedTokenizer
from crn_jax.input_pipeline.tokenizers.words import EOS, Vocabulary
from crn_jax.methods.registry import METHODS
from crn_jax.models.dual_encoder import DualEncoderConfig
from crn_jax.workdir import weights


def uses_towers(config: ml_collections.ConfigDict) -> bool:
  """Whether the configuration's method works on a pair of towers."""
  return config.method in METHODS and METHODS[config.method].pretrained == "encoder"


def describe(config: ml_collections.ConfigDict) -> None:
  """Writes the towers' description into a configuration, in place.

  `model.encoder` becomes what stands in the folder `model.pretrained`, unless the configuration is
  that of a run and has it. `data.image_size`, `data.resize` and `data.max_words` that are None
  become the towers' own. Methods without towers are left alone.

  Raises:
    UserError: if the folder is not there, or holds no towers.
  """
  if not uses_towers(config):
    return
  if not config.model.encoder:
    with config.unlocked():
      config.model.encoder.update(read(config.model.pretrained).to_dict())
  towers = DualEncoderConfig.from_dict(config.model.encoder.to_dict())
  data = config.data
  if data.image_size is None:
    data.image_size = towers.image.image_size
  if data.resize is None:
    data.resize = data.image_size
  if data.max_words is None:
    data.max_words = towers.text.length


def read(folder: str) -> DualEncoderConfig:
  """The description in a folder of towers that convert_torch_weights.py wrote.

  Raises:
    UserError: if the folder is not there, or holds no towers.
  """
  if not folder:
    raise UserError(
      "model.pretrained: this method works on pretrained towers; name the folder of some, e.g. "
      "--config.model.pretrained=weights/bge_vl_base"
    )
  if not pathlib.Path(folder).exists():
    raise UserError(
      f"{folder}: pretrained towers (model.pretrained) not found. Make the folder with\n"
      f"  python convert_torch_weights.py --input=HUGGINGFACE_FOLDER --output={folder}\n"
      f"from the files of a CLIP or SigLIP model (docs/encoders.md)"
    )
  architecture = dict(weights.read_metadata(folder)["architecture"])
  if (module := architecture.pop("module")) != "DualEncoder":
    raise UserError(
      f"{folder}: holds the weights of a {module}, a backbone without a text tower; this method "
      f"works on a pair of towers (docs/encoders.md)"
    )
  return DualEncoderConfig.from_dict(architecture)


def new_tokenizer(config: ml_collections.ConfigDict, captions: Iterable[str]) -> Tokenizer:
  """The tokenizer of a run that begins: that of the towers, or the words of the captions.

  Args:
    config: the whole configuration.
    captions: of the training data; of no use for pretrained towers.

  Raises:
    UserError: if the folder of the towers has no tokenizer that can be read, or towers without a
      folder cannot read words.
  """
  if not uses_towers(config) or not config.model.pretrained:
    words = Vocabulary.build(
      captions, markers=config.data.markers, max_words=config.data.max_words
    )  # fmt: skip
    if uses_towers(config):
      _check_words(words, config.model.encoder.text)
    return words
  folder = pathlib.Path(config.model.pretrained) / pretrained.FOLDER
  lower_case = config.model.encoder.family == "siglip"
  found = PretrainedTokenizer(folder, config.data.max_words, lower_case)
  rows = config.model.encoder.text.vocab_size
  if len(found) > rows:
    raise UserError(
      f"{folder}: a tokenizer of {len(found)} ids for towers with {rows}; the files do not belong "
      f"together"
    )
  return found


def _check_words(words: Vocabulary, tower: ml_collections.ConfigDict) -> None:
  """Raises UserError unless a text tower that starts from random values can read a word table."""
  if len(words) > tower.vocab_size:
    raise UserError(
      f"model.encoder.text.vocab_size = {tower.vocab_size}: the captions have {len(words)} words; "
      f"name the folder of pretrained towers with model.pretrained, or a larger number"
    )
  if words.markers != "tokens" or (tower.pooling, tower.end_id) != ("end", EOS):
    raise UserError(
      f"model.encoder.text: towers that start from random values read words whose end is {EOS}; "
      f"expected pooling 'end', end_id {EOS} and data.markers 'tokens', got {tower.pooling!r}, "
      f"{tower.end_id} and {words.markers!r}"
    )


def save(
  config: ml_collections.ConfigDict,
  params: dict,
  step: int,
  workdir: pathlib.Path,
  folder: pathlib.Path,
) -> None:
  """Writes trained towers as a folder for `model.pretrained`.

  Args:
    config: of the run.
    params: of the towers.
    step: of the checkpoint that they come from.
    workdir: of the run; its tokenizer's files are copied.
    folder: to write.
  """
  towers = DualEncoderConfig.from_dict(config.model.encoder.to_dict())
  towers = towers.with_image_size(config.data.image_size)
  metadata = {
    "kind": f"{towers.family} towers, fine-tuned",
    "architecture": {"module": "DualEncoder", **towers.to_dict()},
    "source": {"run": config.name, "step": step},
  }
  files = workdir / pretrained.FOLDER
  beside = {f"{pretrained.FOLDER}/{name}": files / name for name in pretrained.found_files(files)}
  weights.save_backbone({"params": params}, metadata, folder, beside=beside)
