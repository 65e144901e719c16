"""Published results of the methods that can be trained here, to stand beside measured ones.

The same rows are in docs/results.md, which says where each was read; a test holds both together.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

MEAN = "mean"  # Over the categories.


@dataclasses.dataclass(frozen=True)
class Published:
  """A row of a paper's table.

  Attributes:
    preset: the method's name here.
    backbone: as the paper says.
    dataset: e.g. "fashioniq".
    protocol: as in eval.json.
    percent: category (of a data set that has some; "" if not) -> metric -> percent.
  """

  preset: str
  backbone: str
  dataset: str
  protocol: str
  percent: Mapping[str, Mapping[str, float]]


def _fashioniq(preset: str, backbone: str, protocol: str, *recalls: float) -> Published:
  """R@10 and R@50 of dress, shirt, toptee and, if it was published, of their mean."""
  parts = ("dress", "shirt", "toptee", MEAN)[: len(recalls) // 2]
  pairs = zip(recalls[0::2], recalls[1::2], strict=True)
  percent = {
    part: {"R@10": r10, "R@50": r50} for part, (r10, r50) in zip(parts, pairs, strict=True)
  }
  return Published(preset, backbone, "fashioniq", protocol, percent)


def _mean(preset: str, backbone: str, protocol: str, r10: float, r50: float) -> Published:
  """R@10 and R@50 of FashionIQ's mean alone."""
  return Published(preset, backbone, "fashioniq", protocol, {MEAN: {"R@10": r10, "R@50": r50}})


def _other(dataset: str, protocol: str, metrics: Sequence[str]):
  def row(preset: str, backbone: str, *values: float) -> Published:
    # Of those that were published, the last ones.
    percent = {"": dict(zip(metrics[-len(values) :], values, strict=True))}
    return Published(preset, backbone, dataset, protocol, percent)

  return row


_shoes = _other("shoes", "eval_list", ("R@1", "R@10", "R@50"))
_fashion200k = _other("fashion200k", "test_images", ("R@10", "R@50"))

ROWS = (
  _fashioniq("crn", "Swin-L", "val_split", 32.67, 59.30, 30.27, 56.97, 37.74, 65.94, 33.56, 60.74),
  _fashioniq("crn", "Swin-B", "val_split", 30.34, 57.61, 29.83, 55.54, 33.91, 64.04, 31.36, 59.06),
  _fashioniq(
    "crn", "ResNet-50", "val_split", 30.20, 57.15, 29.17, 55.03, 33.70, 63.91, 31.02, 58.70
  ),
  _fashioniq(
    "clvc_net", "ResNet-50", "val_split", 29.85, 56.47, 28.75, 54.76, 33.50, 64.00, 30.70, 58.41
  ),
  _fashioniq("film", "ResNet-50", "val_split", 14.23, 33.34, 15.04, 34.09, 17.30, 37.68),
  _fashioniq(
    "tirg", "ResNet-50", "val_split", 14.87, 34.66, 18.26, 37.89, 19.08, 39.62, 17.40, 37.39
  ),
  _fashioniq(
    "val", "ResNet-50", "val_split", 21.12, 42.19, 21.03, 43.44, 25.64, 49.49, 22.60, 45.04
  ),
  _mean("dcnet", "ResNet-50", "original_split", 27.78, 53.89),
  _shoes("film", "ResNet-50", 38.89, 68.30),
  _shoes("tirg", "ResNet-50", 12.60, 45.45, 69.39),
  _shoes("val", "ResNet-50", 16.49, 49.12, 73.53),
  _shoes("dcnet", "ResNet-50", 53.82, 79.33),
  _fashion200k("film", "ResNet-18", 39.5, 61.9),
  _fashion200k("tirg", "ResNet-18", 42.5, 63.8),
  _fashion200k("val", "MobileNet", 49.0, 68.8),
  _shoes("crn", "Swin-L", 18.92, 54.55, 80.04),
  _shoes("crn", "Swin-B", 17.32, 54.15, 79.34),
  _shoes("crn", "ResNet-50", 17.19, 53.88, 79.12),
  _shoes("clvc_net", "ResNet-50", 17.64, 54.39, 79.47),
  _fashion200k("crn", "Swin-L", 53.5, 74.5),
  _fashion200k("crn", "Swin-B", 53.3, 73.3),
  _fashion200k("crn", "ResNet-50", 53.1, 73.0),
  _fashion200k("clvc_net", "ResNet-50", 53.0, 72.2),
)


def rows_of(dataset: str, presets: Sequence[str]) -> list[Published]:
  """Rows of a data set and of some methods.

  Args:
    dataset: e.g. "fashioniq".
    presets: as a run records them, e.g. "tirg_equal", "crn_swin_base".
  """

  def is_of(preset: str, row: Published) -> bool:
    return bool(re.fullmatch(rf"{row.preset}(_released)?(_equal)?(_(swin|resnet)\w+)?", preset))

  return [row for row in ROWS if row.dataset == dataset and any(is_of(p, row) for p in presets)]
