"""CRN with Swin-L on FashionIQ toptee, with the published settings.

python main.py --config=configs/fashioniq_toptee.py --config.data.root=PATH

The paper reports R@10 37.74, R@50 65.94 on the val_split gallery (Swin-L, best epoch).
"""

import ml_collections

from configs import default


def get_config(preset: str = "crn") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(preset)
  config.name = f"fashioniq_toptee_{preset}"
  config.data.category = "toptee"
  return config
