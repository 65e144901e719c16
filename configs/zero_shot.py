"""Pretrained towers (CLIP, SigLIP, BGE-VL) as they are: nothing is trained.

python convert_torch_weights.py --hub=BAAI/BGE-VL-base --output=weights/bge_vl_base
python main.py --config=configs/zero_shot.py --config.model.pretrained=weights/bge_vl_base \
  --config.data.root=PATH --mode=eval

On FashionIQ; after a colon another configuration may be named, whose data set is taken:
`--config=configs/zero_shot.py:shoes`, `:demo`.
"""

import importlib
import pathlib

import ml_collections
from absl import flags
from ml_collections import config_dict


def get_config(name: str = "") -> ml_collections.ConfigDict:
  """Configuration of another file, with towers and without training.

  Args:
    name: of the file, which says the data set; '' is fashioniq_all.

  Raises:
    flags.IllegalFlagValueError: there is no such file.
  """
  others = {path.stem for path in pathlib.Path(__file__).parent.glob("*.py")}
  known = sorted(others - {"default", "run", "zero_shot", "crn_towers"})
  if name not in ("", "default", *known):
    # Not a ValueError, to which the configuration's parser adds a traceback.
    raise flags.IllegalFlagValueError(
      f"{name!r} after the configuration's colon: expected one of {', '.join(known)}"
    )
  config = importlib.import_module(f"configs.{name or 'fashioniq_all'}").get_config()
  config.name = f"zero_shot_{name}" if name else "zero_shot"
  config.preset = "zero_shot"
  config.method = "zero_shot"
  config.model.pretrained = ""  # To be given: the folder of converted towers.
  for size in ("image_size", "resize", "max_words"):  # None: the towers' own.
    with config.data.unlocked():
      del config.data[size]
      config.data[size] = config_dict.placeholder(int)
  return config
