"""CRN with Swin-L on FashionIQ shirt, with the published settings.

python main.py --config=configs/fashioniq_shirt.py --config.data.root=PATH

The paper reports R@10 30.27, R@50 56.97 on the val_split gallery (Swin-L, best epoch).
"""

import ml_collections

from configs import default


def get_config(preset: str = "crn") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(preset)
  config.name = f"fashioniq_shirt_{preset}"
  config.data.category = "shirt"
  return config
