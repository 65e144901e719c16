"""CRN or CLVC-Net on Fashion200k, with the published settings.

python main.py --config=configs/fashion200k.py --config.data.root=PATH

Published R@10 / R@50 (best epoch; the rows of CRN were read second-hand):
  fashion200k.py            CRN, Swin-L     53.5 / 74.5
  fashion200k.py:swin_base  CRN, Swin-B     53.3 / 73.3
  fashion200k.py:resnet50   CRN, ResNet-50  53.1 / 73.0
  fashion200k.py:clvc_net   CLVC-Net        53.0 / 72.2
"""

import ml_collections

from configs import default, presets


def get_config(names: str = "") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(names)
  config.name = f"fashion200k_{config.preset}"
  config.seed = 6195
  config.num_epochs = 40
  config.data.dataset = "fashion200k"
  config.data.root = "data/fashion200k"
  config.data.max_words = 8  # "replace A with B" and two markers.
  config.data.resize = 224
  config.data.augment = "none"
  if presets.parse(names).decays_with_data:
    config.optimizer.max_decay_epoch = 40  # The rate decays once, at epoch 20.
  config.eval.best_metric = "test_images/R@10"
  return config
