"""CRN with Swin-L on Shoes, with the published settings.

python main.py --config=configs/shoes.py --config.data.root=PATH

The paper reports R@1 18.92, R@10 54.55, R@50 80.04 (Swin-L, best epoch). An epoch has about twice
as many steps as there are pairs, see data.shoes_pairs.
"""

import ml_collections

from configs import default


def get_config(preset: str = "crn") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(preset)
  config.name = f"shoes_{preset}"
  config.seed = 6195
  config.data.dataset = "shoes"
  config.data.root = "data/shoes"
  config.data.augment = "none"
  config.optimizer.max_decay_epoch = 30  # The rate decays once, at epoch 20.
  config.eval.best_metric = "eval_list/R@10"
  return config
