"""Pretrained towers (CLIP, SigLIP, BGE-VL) as they are, on FashionIQ: nothing is trained.

python convert_torch_weights.py --hub=BAAI/BGE-VL-base --output=weights/bge_vl_base
python main.py --config=configs/zero_shot.py --config.model.pretrained=weights/bge_vl_base \
  --config.data.root=PATH --mode=eval

Other data sets: --config.data.dataset=shoes --config.eval.best_metric=..., see docs/encoders.md.
"""

import ml_collections
from ml_collections import config_dict

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config()
  config.name = "zero_shot"
  config.preset = "zero_shot"
  config.method = "zero_shot"
  config.model.pretrained = ""  # To be given: the folder of converted towers.
  # None: the towers' own, from their files.
  for name in ("image_size", "resize", "max_words"):
    config.data[name] = config_dict.placeholder(int)
  return config
