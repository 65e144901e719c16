"""CRN's composition on pretrained towers, FashionIQ; no published run, no expected recall.

python convert_torch_weights.py --hub=openai/clip-vit-base-patch32 --output=weights/clip
python main.py --config=configs/crn_towers.py --config.model.pretrained=weights/clip \
  --config.data.root=PATH
"""

import ml_collections
from ml_collections import config_dict

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """See `configs/default.py`; sizes that are None are the towers' own."""
  config = default.get_config()
  config.name = config.preset = "crn_towers"
  config.method = "crn_towers"
  config.model.pretrained = ""  # To be given: the folder of converted towers.
  config.model.map_dim = None  # The patches' width.
  config.model.keep_map = True
  for size in ("image_size", "resize", "max_words"):
    with config.data.unlocked():
      del config.data[size]
      config.data[size] = config_dict.placeholder(int)
  config.optimizer.backbone_rate = 0.1  # Of the towers.
  return config
