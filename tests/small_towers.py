"""Small random CLIP and SigLIP models with tokenizers, as Hugging Face folders.

Written by transformers itself; sizes are odd, so that no two can be taken for one another.
"""

import gzip
import json
import pathlib

import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from tests.torch_models import torch, transformers

FAMILIES = ("clip", "siglip", "siglip2")
_CAPTIONS = pathlib.Path(__file__).parent / "goldens" / "fashion-iq" / "captions"
ROWS = 350  # Ids of every tokenizer here.
_SIZES = {"image_size": 23, "patch_size": 5}
LENGTH = {"clip": 77, "siglip": 13, "siglip2": 13}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def captions(count: int = 200) -> list[str]:
  """Real captions of FashionIQ."""
  with gzip.open(_CAPTIONS / "cap.dress.val.json.gz", "rt", encoding="utf-8") as file:
    entries = json.load(file)
  return [caption for entry in entries for caption in entry["captions"]][:count]


def model(family: str, **changed) -> torch.nn.Module:
  """A random model; its values are far enough from zero for every part to matter.

  Args:
    family: one of `FAMILIES`.
    changed: 'vision' and 'text', fields of the two configurations that are different.
  """
  torch.manual_seed(0)
  vision = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
            "intermediate_size": 44, **_SIZES}  # fmt: skip
  text = {"hidden_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 36, "vocab_size": ROWS,
          "max_position_embeddings": LENGTH[family]}  # fmt: skip
  whole = {}
  if family == "clip":
    config_class, model_class = transformers.CLIPConfig, transformers.CLIPModel
    whole["projection_dim"] = 18
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
  elif family == "siglip":
    config_class, model_class = transformers.SiglipConfig, transformers.SiglipModel
    text |= {"projection_size": 24, "bos_token_id": 0, "eos_token_id": 1}
  else:
    config_class, model_class = transformers.Siglip2Config, transformers.Siglip2Model
    vision = {k: v for k, v in vision.items() if k != "image_size"} | {"num_patches": 16}
    text |= {"projection_size": 24, "bos_token_id": 2, "eos_token_id": 1}
  vision |= changed.get("vision", {})
  text |= changed.get("text", {})
  config = config_class(vision_config=vision, text_config=text, **whole)
  found = model_class(config).eval()
  with torch.no_grad():
    for parameter in found.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  return found


def save_tokenizer(family: str, folder: pathlib.Path) -> None:
  """A tokenizer of `ROWS` ids at most, trained on captions."""
  if family == "clip":
    fast = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    fast.normalizer = normalizers.Lowercase()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
      [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
      vocab_size=ROWS, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    fast.train_from_iterator(captions(), trainer)
    fast.model.save(str(folder))  # vocab.json and merges.txt.
    return
  if family == "siglip":
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(c.lower() for c in captions()), model_prefix=str(folder / "spiece"),
      vocab_size=ROWS, pad_id=-1, bos_id=-1, eos_id=1, unk_id=0, hard_vocab_limit=False,
      minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    settings = {"tokenizer_class": "SiglipTokenizer", "model_max_length": LENGTH[family]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return
  fast = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
  fast.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
  fast.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
  special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
  trainer = trainers.BpeTrainer(vocab_size=ROWS, special_tokens=special, show_progress=False)
  fast.train_from_iterator(captions(), trainer)
  trained = json.loads(fast.to_str())["model"]
  merges = [tuple(pair) for pair in trained["merges"]]
  found = transformers.Siglip2Tokenizer(
    vocab=trained["vocab"], merges=merges, add_eos_token=True, add_bos_token=False
  )
  found.save_pretrained(folder)


def preprocessing(family: str, side: int = _SIZES["image_size"]) -> dict:
  """Fields of preprocessor_config.json as the published folders have them."""
  square = {"height": side, "width": side}
  own = {
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side},
             "do_center_crop": True, "crop_size": square, "resample": 3},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": square, "resample": 3},
    "siglip2": {"image_processor_type": "Siglip2ImageProcessor", "resample": 2,
                "patch_size": _SIZES["patch_size"],
                "max_num_patches": (side // _SIZES["patch_size"]) ** 2},
  }[family]  # fmt: skip
  done = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
  return {**done, **own, "image_mean": MEAN, "image_std": STD}


def save_preprocessing(family: str, folder: pathlib.Path) -> None:
  (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing(family)))


def save(family: str, folder: pathlib.Path, **changed) -> torch.nn.Module:
  """Writes a whole folder; the model that is in it."""
  found = model(family, **changed)
  found.save_pretrained(folder)
  save_preprocessing(family, folder)
  save_tokenizer(family, folder)
  return found
