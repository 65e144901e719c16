"""PyTorch's CPU builds as the tests use them: `from tests.torch_cpu import timm, torch`.

Their torchvision lacks two operators that it describes on import; they are declared first.
"""

import torch

_library = torch.library.Library("torchvision", "DEF")  # Kept: what it declares goes with it.
for _name in ("nms", "qnms"):
  _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
import timm.layers  # noqa: E402
import timm.models.swin_transformer  # noqa: E402
import transformers  # noqa: E402

__all__ = ["randomize", "timm", "torch", "transformers"]


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
  """Values that leave nothing at one or zero, and keep features of order one."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in module.named_parameters():
      noise = torch.randn(p.shape, generator=generator)
      if "norm" in name and name.endswith("weight"):
        p.copy_(1 + 0.1 * noise)
      elif p.ndim > 1 and "table" not in name:
        p.copy_(noise / p[0].numel() ** 0.5)
      else:
        p.copy_(0.1 * noise)
