"""CRN or CLVC-Net on Shoes, with the published settings.

python main.py --config=configs/shoes.py --config.data.root=PATH

Published R@1 / R@10 / R@50 (best epoch; the rows of CRN were read second-hand):
  shoes.py            CRN, Swin-L     18.92 / 54.55 / 80.04
  shoes.py:swin_base  CRN, Swin-B     17.32 / 54.15 / 79.34
  shoes.py:resnet50   CRN, ResNet-50  17.19 / 53.88 / 79.12
  shoes.py:clvc_net   CLVC-Net        17.64 / 54.39 / 79.47

An epoch has about twice as many steps as there are pairs, see data.shoes_pairs.
"""

import ml_collections

from configs import default, presets


def get_config(names: str = "") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(names)
  config.name = f"shoes_{config.preset}"
  config.seed = 6195
  config.data.dataset = "shoes"
  config.data.root = "data/shoes"
  config.data.augment = "none"
  if presets.parse(names).decays_with_data:
    config.optimizer.max_decay_epoch = 30  # The rate decays once, at epoch 20.
  config.eval.best_metric = "eval_list/R@10"
  return config
