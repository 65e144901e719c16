"""CRN or CLVC-Net on FashionIQ toptee, with the published settings.

python main.py --config=configs/fashioniq_toptee.py --config.data.root=PATH

Published R@10 / R@50 on the val_split gallery (best epoch):
  fashioniq_toptee.py            CRN, Swin-L     37.74 / 65.94
  fashioniq_toptee.py:swin_base  CRN, Swin-B     33.91 / 64.04
  fashioniq_toptee.py:resnet50   CRN, ResNet-50  33.70 / 63.91
  fashioniq_toptee.py:clvc_net   CLVC-Net        33.50 / 64.00
"""

import ml_collections

from configs import default


def get_config(names: str = "") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(names)
  config.name = f"fashioniq_toptee_{config.preset}"
  config.data.category = "toptee"
  return config
