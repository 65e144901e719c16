"""Small folders of the form of CIRR and CIRCO, with made-up annotations and plain pictures."""

import json
import pathlib

import numpy as np
from PIL import Image

CIRR = {"train": (24, 20), "val": (18, 12), "test1": (60, 7)}  # split -> images, pairs
CIRCO_IMAGES = 70
CIRCO = {"val": 6, "test": 5}  # split -> queries
_TEXTS = ("is red", "show two of them", "no people, in the snow", "the same dog at night")


def write_json(path: pathlib.Path, content) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content))


def edit_json(path: pathlib.Path, change) -> None:
  """Changes the content of a file in place."""
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def _picture(path: pathlib.Path, rng) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((40, 32)).save(path)


def cirr(root: pathlib.Path) -> pathlib.Path:
  """Groups of six images each; a pair's two images are of one group."""
  rng = np.random.default_rng(0)
  pairid = 100
  for split, (n_images, n_pairs) in CIRR.items():
    folder = {"train": "train/{}/", "val": "dev/", "test1": "test1/"}[split]
    prefix = "dev" if split == "val" else split
    names = [f"{prefix}-{i}-0-img0" for i in range(n_images)]
    files = {n: f"./{folder.format(i % 3)}{n}.png" for i, n in enumerate(names)}
    for path in files.values():
      _picture(root / "img_raw" / path, rng)
    write_json(root / f"image_splits/split.rc2.{split}.json", files)
    pairs = []
    for i in range(n_pairs):
      start = 6 * (i % (n_images // 6))
      members = names[start : start + 6]
      reference, target = (members[j] for j in rng.permutation(6)[:2])
      pair = {
        "pairid": pairid + i,
        "reference": reference,
        "target_hard": target,
        "target_soft": {target: 1.0},
        "caption": _TEXTS[i % len(_TEXTS)],
        "img_set": {"id": start, "members": members, "reference_rank": 1, "target_rank": 2},
      }
      if split == "test1":
        del pair["target_hard"], pair["target_soft"], pair["img_set"]["target_rank"]
      pairs.append(pair)
    pairid += n_pairs
    write_json(root / f"captions/cap.rc2.{split}.json", pairs)
  return root


def circo(root: pathlib.Path) -> pathlib.Path:
  """Queries with one to four right images."""
  rng = np.random.default_rng(1)
  ids = (3 + 7 * rng.permutation(CIRCO_IMAGES)).tolist()
  coco = root / "COCO2017_unlabeled"
  images = [{"id": i, "file_name": f"{i:012d}.jpg", "license": 1} for i in ids]
  for image in images:
    _picture(coco / "unlabeled2017" / image["file_name"], rng)
  write_json(coco / "annotations/image_info_unlabeled2017.json", {"info": {}, "images": images})
  for split, n in CIRCO.items():
    queries = []
    for i in range(n):
      reference, *truths = rng.permutation(ids)[: 2 + i % 4].tolist()
      query = {
        "reference_img_id": reference,
        "target_img_id": truths[0],
        "relative_caption": _TEXTS[i % len(_TEXTS)],
        "shared_concept": "a thing",
        "gt_img_ids": truths,
        "id": i,
      }
      if split == "test":
        del query["target_img_id"], query["gt_img_ids"]
      queries.append(query)
    write_json(root / f"annotations/{split}.json", queries)
  return root
