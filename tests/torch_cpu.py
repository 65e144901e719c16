"""Import before torchvision, whatever the builds of PyTorch and torchvision.

Beside PyTorch's CPU build torchvision's GPU build, which pip takes, cannot load its own operators
and fails on two of them that no test uses; declaring them is enough. Where torchvision has them,
to declare them again would end the process.
"""

import importlib

import torch

try:
  importlib.import_module("torchvision")
except RuntimeError:
  _library = torch.library.Library("torchvision", "DEF")
  for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
