"""CRN with Swin-L on FashionIQ dress, with the published settings.

python main.py --config=configs/fashioniq_dress.py --config.data.root=PATH

The paper reports R@10 32.67, R@50 59.30 on the val_split gallery (Swin-L, best epoch).
"""

import ml_collections

from configs import default


def get_config(preset: str = "crn") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(preset)
  config.name = f"fashioniq_dress_{preset}"
  config.data.category = "dress"
  return config
