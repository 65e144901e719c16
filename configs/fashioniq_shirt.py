"""CRN or CLVC-Net on FashionIQ shirt, with the published settings.

python main.py --config=configs/fashioniq_shirt.py --config.data.root=PATH

Published R@10 / R@50 on the val_split gallery (best epoch):
  fashioniq_shirt.py            CRN, Swin-L     30.27 / 56.97
  fashioniq_shirt.py:swin_base  CRN, Swin-B     29.83 / 55.54
  fashioniq_shirt.py:resnet50   CRN, ResNet-50  29.17 / 55.03
  fashioniq_shirt.py:clvc_net   CLVC-Net        28.75 / 54.76
"""

import ml_collections

from configs import default


def get_config(names: str = "") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(names)
  config.name = f"fashioniq_shirt_{config.preset}"
  config.data.category = "shirt"
  return config
