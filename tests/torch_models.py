"""PyTorch models whose weights are converted in tests."""

from tests import torch_cpu  # isort: skip  (before timm, which imports torchvision)

import timm
import timm.layers
import timm.models.swin_transformer
import torch
import torchvision
import transformers

__all__ = ["randomize", "timm", "torch", "torch_cpu", "torchvision", "transformers"]


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
