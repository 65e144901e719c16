"""CRN or CLVC-Net on FashionIQ dress, with the published settings.

python main.py --config=configs/fashioniq_dress.py --config.data.root=PATH

Published R@10 / R@50 on the val_split gallery (best epoch):
  fashioniq_dress.py            CRN, Swin-L     32.67 / 59.30
  fashioniq_dress.py:swin_base  CRN, Swin-B     30.34 / 57.61
  fashioniq_dress.py:resnet50   CRN, ResNet-50  30.20 / 57.15
  fashioniq_dress.py:clvc_net   CLVC-Net        29.85 / 56.47
"""

import ml_collections

from configs import default


def get_config(names: str = "") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(names)
  config.name = f"fashioniq_dress_{config.preset}"
  config.data.category = "dress"
  return config
