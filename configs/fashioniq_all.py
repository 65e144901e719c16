"""CRN with Swin-L on the three categories of FashionIQ together; evaluated a category at a time.

python main.py --config=configs/fashioniq_all.py --config.data.root=PATH
python main.py --config=configs/fashioniq_all.py:clip4cir --config.data.root=PATH \
  --config.model.pretrained=weights/clip_vit_large

Of CRN not a published setting (the paper trains a model a category); CLIP4Cir's is this one.
"""

import ml_collections

from configs import default


def get_config(names: str = "") -> ml_collections.ConfigDict:
  """See `configs/default.py`."""
  config = default.get_config(names)
  config.name = f"fashioniq_all_{config.preset}"
  config.data.category = "all"
  return config
