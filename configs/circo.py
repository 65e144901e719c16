r"""Evaluates on CIRCO, which has no training split, a run that was trained on CIRR.

python main.py --config=configs/circo.py --workdir=runs/cirr_crn --mode=eval \
  --config.data.root=PATH

The run is one of configs/cirr.py with the same names behind the colon. --mode=submit instead writes
the file for CIRCO's server.
"""

import ml_collections

from configs import cirr


def get_config(names: str = "") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = cirr.get_config(names)
  config.name = f"circo_{config.preset}"
  config.data.dataset = "circo"
  config.data.root = "data/circo"
  config.eval.best_metric = "coco_unlabeled/mAP@10"
  return config
