"""What a backbone's name stands for, and how its pictures are prepared."""

import dataclasses

import numpy as np
import pytest

from configs import default
from crn_jax.errors import UserError
from crn_jax.models.backbones import registry
from crn_jax.models.preprocessing import IMAGENET


def config(**fields):
  c = default.get_config()
  c.model.backbone.update(fields)
  return c


def test_pictures_are_prepared_as_the_named_backbone_wants_unless_it_is_said():
  assert registry.preprocessing(config().model.backbone) == IMAGENET
  changed = registry.preprocessing(
    config(mean=(0.5, 0.5, 0.5), interpolation="bicubic").model.backbone
  )
  assert (changed.mean, changed.std) == ((0.5, 0.5, 0.5), IMAGENET.std)
  assert changed.interpolation == "bicubic"
  white = np.full((1, 2, 2, 3), 255, np.uint8)
  np.testing.assert_allclose(changed.normalize(white)[0, 0, 0], 0.5 / np.array(IMAGENET.std))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mean": (0.5,)}, "model.backbone.mean: expected three numbers"),
    ({"std": (0.5, 0.5, 0.0)}, "model.backbone.std: expected positive numbers"),
    ({"interpolation": "nearest"}, "model.backbone.interpolation: expected one of"),
  ],
)
def test_values_that_are_none_are_refused_by_field(fields, message):
  with pytest.raises(UserError, match=message):
    registry.preprocessing(config(**fields).model.backbone)


def test_prepared_images_are_refused_where_pictures_are_squeezed():
  wanted = dataclasses.replace(IMAGENET, squeeze=True)
  with pytest.raises(UserError, match="data.prepared: .*by their short side, .* squeezed into sq"):
    registry.check_prepared("folder", wanted)
  registry.check_prepared("", wanted)


def test_prepared_images_of_another_interpolation_are_refused():
  wanted = dataclasses.replace(IMAGENET, interpolation="bicubic")
  registry.check_prepared("", wanted)
  registry.check_prepared("prepared", IMAGENET)
  with pytest.raises(UserError, match="prepared images are resized bilinear"):
    registry.check_prepared("prepared", wanted)
