"""CRN or CLVC-Net on CIRR.

python main.py --config=configs/cirr.py --config.data.root=PATH
python main.py --config=configs/cirr.py --config.data.root=PATH --mode=submit

The second command writes the two files for CIRR's server from the run of the first. Not a published
setting: neither model was published on CIRR.
"""

import ml_collections

from configs import default


def get_config(names: str = "") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(names)
  config.name = f"cirr_{config.preset}"
  config.data.dataset = "cirr"
  config.data.root = "data/cirr"
  config.eval.recall_at = (1, 5, 10, 50)
  config.eval.best_metric = "cirr_val/mean"
  return config
