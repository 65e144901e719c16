"""How pictures are brought to what a backbone was trained on; it belongs to the backbone."""

import dataclasses

import numpy as np

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What a backbone expects of its pictures.

  Attributes:
    mean, std: of each RGB channel, in units of the full range (255).
    interpolation: with which pictures are resized, 'bilinear' or 'bicubic', antialiased.
    squeeze: whether pictures are resized to squares, whatever their shape; else by their short
      side, and the middle is cut out.
  """

  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  interpolation: str
  squeeze: bool = False

  def normalize(self, pictures):
    """(x / 255 - mean) / std per channel.

    Takes NumPy or JAX arrays and gives back the same sort; works under `jax.jit`.

    Args:
      pictures: [..., h, w, 3] uint8.

    Returns:
      [..., h, w, 3] float32.
    """
    mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
    return (pictures.astype(np.float32) / np.float32(255) - mean) / std


# Pictures are resized as the PyTorch release does it, whatever the weights were trained with.
IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
