"""A folder of converted towers searches as it is: untrained, and without a configuration."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from crn_jax import pretrained
from crn_jax.catalogue import encoders, indexing, model
from crn_jax.catalogue.retriever import Retriever
from crn_jax.catalogue.store import Store
from crn_jax.convert import backbone
from crn_jax.errors import UserError
from crn_jax.input_pipeline import loader
from crn_jax.retrieval.encode import picture_sizing
from crn_jax.workdir import weights
from tests import small_towers
from tests.convert import small_swin
from tests.torch_models import torch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

N, SIDE = 6, 23  # As large as the towers take them, so that nothing is resized.
TEXTS = ("is blue and has longer sleeves", "more colorful")
# Of vectors (tests/models/test_dual_encoder_parity.py), and so of their products.
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=["clip", "siglip"])
def towers(request, tmp_path_factory):
  """Folder with pictures and converted towers; the PyTorch model, its tokenizer's folder."""
  folder = tmp_path_factory.mktemp(request.param)
  reference = small_towers.save(request.param, folder / "original")
  backbone.convert(folder / "original", folder / "towers")
  (folder / "pictures").mkdir()
  for i in range(N):
    pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
  return folder, reference


def unit(x) -> np.ndarray:
  x = x.detach().numpy().astype(np.float64)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def pooled(features) -> torch.Tensor:
  return getattr(features, "pooler_output", features)


def test_scores_are_those_of_the_published_model(towers):
  folder, reference = towers
  loaded = model.load(folder / "towers")
  with Store(folder / "a.db", create=True) as store:
    report = indexing.update(store, encoders.Encoders(loaded), folder / "pictures")
  assert (report.total, report.skipped) == (N, [])
  paths = [folder / "pictures" / f"{i}.png" for i in range(N)]
  pixels = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(np.float32) / 255
  pixels = (pixels - small_towers.MEAN) / small_towers.STD
  ids, mask = loaded.tokenizer.encode_all([(text,) for text in TEXTS])
  given = {"input_ids": torch.tensor(ids.astype(np.int64))}
  if mask.shape[1] == small_towers.LENGTH["clip"]:  # SigLIP reads its padding.
    given["attention_mask"] = torch.tensor(mask.astype(np.int64))
  with torch.no_grad():
    images = pooled(
      reference.get_image_features(torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32))
    )
    texts = pooled(reference.get_text_features(**given))
  with Retriever.open(folder / "a.db", batch_size=4) as retriever:
    for i, text in enumerate(TEXTS):
      for query, vector in (
        ({"image": paths[i], "text": text}, unit(images[i] + texts[i])),
        ({"image": paths[i]}, unit(images[i])),
        ({"text": text}, unit(texts[i])),
      ):
        hits = retriever.query(**query, k=N)
        expected = unit(images) @ vector
        assert len(hits) == N
        np.testing.assert_allclose(
          [hit.score for hit in hits],
          [expected[int(hit.id.partition(".")[0])] for hit in hits],
          rtol=0, atol=TOLERANCE,
        )  # fmt: skip
    assert retriever.unknown_words(TEXTS[0]) == []


def test_another_tokenizer_is_another_model(towers, tmp_path):
  folder, _ = towers
  before = model.load(folder / "towers").digest
  shutil.copytree(folder / "towers", tmp_path / "moved")
  assert model.load(tmp_path / "moved").digest == before
  settings = tmp_path / "moved" / "tokenizer" / "tokenizer_config.json"
  settings.write_text(settings.read_text() + "\n" if settings.exists() else "{}")
  assert model.load(tmp_path / "moved").digest != before


def test_towers_that_see_pictures_in_another_way_are_another_model(towers, monkeypatch):
  folder, _ = towers
  before, described = model.load(folder / "towers"), pretrained.read(str(folder / "towers"))
  # As towers that were converted before squeezing was known describe themselves.
  other = dataclasses.replace(described, squeeze=not described.squeeze)
  monkeypatch.setattr(pretrained, "read", lambda folder: other)
  assert model.load(folder / "towers").digest != before.digest


@pytest.mark.parametrize("max_ratio", [None, 1.25])
def test_pictures_are_prepared_as_in_training(max_ratio, towers, tmp_path):
  """An elongated one, which some trainings pad."""
  found = model.load(towers[0] / "towers")
  data = found.method.config.data
  data.update(max_ratio=max_ratio)
  pixels = np.random.default_rng(0).integers(0, 256, (90, 40, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "long.png")
  (expected, *_) = loader.eval_image_batches(
    [str(tmp_path / "long.png")], batch_size=1, sizing=picture_sizing(found.method)
  )
  np.testing.assert_array_equal(encoders.Encoders(found).fit(pixels), expected[0])


def test_a_backbone_alone_is_no_model(tmp_path):
  architecture = {"module": "SwinTransformer", **small_swin.ARGUMENTS}
  weights.save_backbone(
    {"params": small_swin.params()}, {"architecture": architecture}, tmp_path / "swin"
  )
  with pytest.raises(UserError, match="swin: holds the weights of a SwinTransformer, a backbone"):
    model.load(tmp_path / "swin")
