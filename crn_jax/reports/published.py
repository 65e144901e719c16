"""Published results of the methods that can be trained here, to stand beside measured ones.

The same rows are in docs/results.md, which says where each was read; a test holds both together.
"""

import dataclasses
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
  """R@10 and R@50 of dress, shirt, toptee and of their mean, eight numbers."""
  parts = ("dress", "shirt", "toptee", MEAN)
  pairs = zip(recalls[0::2], recalls[1::2], strict=True)
  percent = {
    part: {"R@10": r10, "R@50": r50} for part, (r10, r50) in zip(parts, pairs, strict=True)
  }
  return Published(preset, backbone, "fashioniq", protocol, percent)


def _other(dataset: str, protocol: str, metrics: Sequence[str]):
  def row(preset: str, backbone: str, *values: float) -> Published:
    percent = {"": dict(zip(metrics, values, strict=True))}
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
  return [
    row
    for row in ROWS
    if row.dataset == dataset
    and any(preset == row.preset or preset.startswith(f"{row.preset}_") for preset in presets)
  ]
