"""Import before torchvision, with PyTorch's CPU build.

torchvision's GPU build fails on two operators that are missing there, and that no test uses;
declaring them is enough.
"""

import torch

_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
  _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
