"""CRN with Swin-L on Fashion200k, with the published settings.

python main.py --config=configs/fashion200k.py --config.data.root=PATH

The paper reports R@10 53.5, R@50 74.5 (Swin-L, best epoch).
"""

import ml_collections

from configs import default


def get_config(preset: str = "crn") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(preset)
  config.name = f"fashion200k_{preset}"
  config.seed = 6195
  config.num_epochs = 40
  config.data.dataset = "fashion200k"
  config.data.root = "data/fashion200k"
  config.data.max_words = 8  # "replace A with B" and two markers.
  config.data.resize = 224
  config.data.augment = "none"
  config.optimizer.max_decay_epoch = 40  # The rate decays once, at epoch 20.
  config.eval.best_metric = "test_images/R@10"
  return config
