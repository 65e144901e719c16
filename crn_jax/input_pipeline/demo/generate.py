"""A synthetic data set in FashionIQ's on-disk layout: drawn garments, a few seconds to make.

Garments differ in six attributes (`drawing.ATTRIBUTES`); a triplet changes one or two of them
and keeps the others, and its text names only what changes. Neither the image nor the text alone
finds the target: every reference of a val gallery has many neighbours that differ in one or two
attributes, and many images share the values that a text names. How far either alone can get is
computed from the attributes (`ceilings`) and written to `demo.json`, together with everything else
that is needed to read results on it honestly.

  ROOT/images/ID.jpg
  ROOT/captions/cap.CATEGORY.{train,val}.json        FashionIQ's keys, and "kind" and "changed"
  ROOT/image_splits/split.CATEGORY.{train,val}.json  lists of ids
  ROOT/attributes.json                               {id: {attribute: value}}
  ROOT/demo.json                                     parameters, counts, ceilings
"""

import concurrent.futures
import itertools
import json
import os
import pathlib
import shutil
import uuid

import numpy as np
import tqdm

from crn_jax.errors import UserError
from crn_jax.input_pipeline.demo import captions, drawing

# Raise it whenever the same parameters would give other files: an old folder is then refused.
_VERSION = 1
_SHARE_OF_ONE_CHANGE = 0.3
_NAMES = tuple(drawing.ATTRIBUTES)
_LEVELS = tuple(len(values) for values in drawing.ATTRIBUTES.values())


def ceilings(
  attributes: np.ndarray, reference: np.ndarray, target: np.ndarray, *, k: int = 10
) -> dict[str, float]:
  """How often a perfect ranking finds the target in the first k without one half of the query.

  Both know every image's attributes and leave the reference out. `image_only` also knows how
  often queries change one, two, ... attributes, and ranks the gallery by the likelihood of being
  the target given the reference: P(number of changes) / number of images at that distance.
  `text_only` knows the new values of the attributes that change (more than a text like "has longer
  sleeves" says on its own) and is indifferent among the images that have them. Ties are in random
  order, so that both are expectations.

  Args:
    attributes: [g, a] int, the attributes of the gallery's images.
    reference: [n] int, rows of `attributes`.
    target: [n] int, rows of `attributes`.
    k: cut-off.

  Returns:
    {"image_only": percent, "text_only": percent}.
  """
  n_changes = np.sum(attributes[reference] != attributes[target], axis=1)
  share = np.bincount(n_changes, minlength=attributes.shape[1] + 1) / len(n_changes)
  image_hits, text_hits = [], []
  for r, t in zip(reference, target, strict=True):
    others = np.arange(len(attributes)) != r
    differs = attributes != attributes[r]  # (gallery, attributes)
    distance = differs.sum(axis=1)
    at_distance = np.bincount(distance[others], minlength=len(share))
    likelihood = (share / np.maximum(at_distance, 1))[distance]
    ahead = np.sum(others & (likelihood > likelihood[t]))
    tied = np.sum(others & (likelihood == likelihood[t]))
    image_hits.append(np.clip((k - ahead) / tied, 0.0, 1.0))
    named = differs[t]
    consistent = np.all(attributes[:, named] == attributes[t, named], axis=1)
    text_hits.append(min(1.0, k / np.sum(others & consistent)))
  return {
    "image_only": 100.0 * float(np.mean(image_hits)),
    "text_only": 100.0 * float(np.mean(text_hits)),
  }


def _grid_sizes(n: int) -> list[tuple[int, ...]]:
  """How many levels of each attribute to use for a dense grid of at least n combinations.

  The smallest grids come first, and of those the most even ones: in an elongated grid either few
  images share the values that a text names, or a reference has few near neighbours. Every
  attribute varies if n allows it.
  """
  least = 2 if n >= 2 ** len(_LEVELS) else 1
  sizes = itertools.product(*(range(least, levels + 1) for levels in _LEVELS))
  keys = [(int(np.prod(s)), max(s), sum(s), s) for s in sizes if np.prod(s) >= n]
  if not keys:
    raise ValueError(f"{n} different garments asked for, there are {int(np.prod(_LEVELS))}")
  best = min(keys)[:3]
  return [key[3] for key in keys if key[:3] == best]


class _Grids:
  """Draws attribute combinations from dense grids that take turns through all levels."""

  def __init__(self, rng: np.random.Generator):
    self._rng = rng
    self._order = [rng.permutation(levels) for levels in _LEVELS]
    self._start = [0] * len(_LEVELS)
    self._turn = 0

  def draw(self, n: int, grid_size: int) -> np.ndarray:
    """Returns [n, a] int attributes, all different, from a grid of at least grid_size."""
    choices = _grid_sizes(grid_size)
    sizes = choices[self._turn % len(choices)]
    self._turn += 1
    levels = []
    for i, size in enumerate(sizes):
      # Go on where the previous grid stopped: together a few grids then use every value.
      levels.append(self._order[i][(self._start[i] + np.arange(size)) % _LEVELS[i]])
      self._start[i] += size
    grid = np.array(list(itertools.product(*levels)))
    return grid[self._rng.permutation(len(grid))[:n]]


def _draw_pairs(
  rng: np.random.Generator, attributes: np.ndarray, n: int, *, even: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Draws references and targets that differ in one or two attributes, no pair twice.

  Args:
    rng: source of randomness.
    attributes: [g, a] int.
    n: number of pairs. References take turns, so that n >= g uses every image.
    even: draw which attributes change first, all alike (training: a hem, which has two values,
      changes as often as a colour, which has ten). Otherwise every neighbour is equally likely,
      which tells least about the target from the reference alone.

  Returns:
    reference, target: [n] int, rows of `attributes`.

  Raises:
    ValueError: there are too few neighbours.
  """
  wanted = np.where(np.arange(n) < round(_SHARE_OF_ONE_CHANGE * n), 1, 2)
  wanted = rng.permutation(wanted)
  order = rng.permutation(len(attributes))
  used = [{int(r)} for r in range(len(attributes))]
  reference, target = [], []
  misses = turn = 0
  while len(target) < n:
    r = int(order[turn % len(order)])
    turn += 1
    differs = attributes != attributes[r]
    distance = differs.sum(axis=1)
    distance[list(used[r])] = 0
    free = np.flatnonzero(distance == wanted[len(target)])
    if not len(free):  # the other number of changes rather than none
      free = np.flatnonzero((distance == 1) | (distance == 2))
    if not len(free):
      misses += 1
      if misses == len(attributes):
        raise ValueError(
          f"{n} triplets asked for, but {len(attributes)} images have only {len(target)} pairs "
          "that differ in one or two attributes: ask for more images or fewer triplets"
        )
      continue
    misses = 0
    if even:
      changed = differs[free] @ (1 << np.arange(differs.shape[1]))
      free = free[changed == rng.choice(np.unique(changed))]
    t = int(rng.choice(free))
    used[r].add(t)
    reference.append(r)
    target.append(t)
  return np.array(reference), np.array(target)


def _values(row: np.ndarray) -> dict[str, str]:
  """Attribute numbers -> {attribute: value}."""
  return {name: drawing.ATTRIBUTES[name][i] for name, i in zip(_NAMES, row, strict=True)}


def _make_triplets(rng, category, ids, attributes, reference, target) -> list[dict]:
  """Returns rows of a caption file; half of them are of either kind."""
  kinds = rng.permutation(np.arange(len(reference)) % 2)
  rows = []
  for r, t, kind in zip(reference, target, kinds, strict=True):
    old, new = _values(attributes[r]), _values(attributes[t])
    kind = captions.KINDS[kind]
    rows.append({
      "candidate": ids[r],
      "target": ids[t],
      "captions": captions.write(rng, kind, category, old, new),
      "kind": kind,
      "changed": [name for name in _NAMES if old[name] != new[name]],
    })  # fmt: skip
  return rows


def _write_json(path: pathlib.Path, value) -> None:
  path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_images(folder: pathlib.Path, garments: list[tuple], seed: int, image_size: int) -> None:
  """Draws garments, [(id, category, values)], each from a generator of its own."""

  def draw(i: int) -> None:
    name, category, values = garments[i]
    picture = drawing.draw_garment(
      category, values, np.random.default_rng([seed, 1, i]), image_size
    )
    # Full colour resolution (4:4:4): halved, it would wash out patterns of a few pixels.
    picture.save(folder / f"{name}.jpg", quality=95, subsampling=0)

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    done = pool.map(draw, range(len(garments)))
    for _ in tqdm.tqdm(
      done, total=len(garments), desc="drawing the demo", unit="image", disable=None
    ):
      pass


def _write(folder: pathlib.Path, parameters: dict) -> dict:
  """Writes the whole data set into an existing empty folder; returns demo.json's content."""
  seed, categories = parameters["seed"], parameters["categories"]
  n_images = {"train": parameters["n_train_images"], "val": parameters["n_val_images"]}
  n_triplets = {"train": parameters["n_train_triplets"], "val": parameters["n_val_queries"]}
  for name in ("images", "captions", "image_splits"):
    (folder / name).mkdir()
  rng = np.random.default_rng([seed, 0])
  # Train garments come from a grid three times their number (by default from all combinations), so
  # that a part of the val garments is new; val garments fill theirs, so that they have neighbours.
  grid_size = {
    "train": min(3 * n_images["train"], int(np.prod(_LEVELS))),
    "val": n_images["val"],
  }
  grids = {split: _Grids(rng) for split in n_images}

  garments, report = [], {}
  for category in categories:
    combinations = {}
    for split in ("train", "val"):
      attributes = grids[split].draw(n_images[split], grid_size[split])
      ids = [f"{category}_{split}_{i:05d}" for i in range(len(attributes))]
      reference, target = _draw_pairs(rng, attributes, n_triplets[split], even=split == "train")
      triplets = _make_triplets(rng, category, ids, attributes, reference, target)
      _write_json(folder / "captions" / f"cap.{category}.{split}.json", triplets)
      _write_json(folder / "image_splits" / f"split.{category}.{split}.json", ids)
      garments += [(i, category, _values(a)) for i, a in zip(ids, attributes, strict=True)]
      combinations[split] = {tuple(row) for row in attributes.tolist()}
    # Still at hand from the last split, which is val.
    report[category] = {
      "ceilings": ceilings(attributes, reference, target),
      "gallery": len(np.unique(np.concatenate([reference, target]))),
      "unseen": len(combinations["val"] - combinations["train"]),
    }

  _write_images(folder / "images", garments, seed, parameters["image_size"])
  _write_json(folder / "attributes.json", {i: values for i, _, values in garments})
  summary = {
    "about": "synthetic garments drawn by crn_jax.input_pipeline.demo",
    "parameters": parameters,
    "n_images": len(garments),
    "n_train_triplets": len(categories) * n_triplets["train"],
    "n_val_queries": len(categories) * n_triplets["val"],
    "val_split_gallery": {c: report[c]["gallery"] for c in categories},
    "val_combinations_unseen_in_train": {c: report[c]["unseen"] for c in categories},
    "ceilings_metric": "R@10 in percent, reference excluded, gallery = val list",
    "ceilings": {c: report[c]["ceilings"] for c in categories},
  }
  # Last: a folder with a demo.json is complete.
  _write_json(folder / "demo.json", summary)
  return summary


def _read_existing(root: pathlib.Path, parameters: dict) -> dict | None:
  """Returns demo.json's content if root holds this data set, None if root is free to write to."""
  if not root.exists() or (root.is_dir() and not any(root.iterdir())):
    return None
  mend = "choose another folder, or delete this one and run again"
  try:
    summary = json.loads((root / "demo.json").read_text(encoding="utf-8"))
    found = dict(summary["parameters"])
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f"{root}: exists and is not a demo data set; {mend}") from error
  if found != parameters:
    names = sorted(k for k in found.keys() | parameters if found.get(k) != parameters.get(k))
    detail = ", ".join(f"{k} {found.get(k)} (wanted {parameters.get(k)})" for k in names)
    raise UserError(f"{root}: holds a demo data set with other parameters: {detail}; {mend}")
  return summary


def generate(
  root: str | os.PathLike,
  *,
  seed: int = 0,
  image_size: int = 64,
  n_train_images: int = 1800,
  n_train_triplets: int = 9000,
  n_val_images: int = 720,
  n_val_queries: int = 2000,
  categories: tuple[str, ...] = drawing.CATEGORIES,
) -> dict:
  """Writes the demo data set; returns at once if it is already there.

  The same arguments give the same files, byte for byte with the same versions of NumPy and
  Pillow. The folder appears complete or not at all.

  Args:
    root: folder to make. Its parents are made too.
    seed: of everything that is random.
    image_size: side of the pictures in pixels; drawn for 64.
    n_train_images: images per category, all different combinations of attributes.
    n_train_triplets: training triplets per category.
    n_val_images: val images per category, all different combinations of attributes, so that every
      query has exactly one right answer.
    n_val_queries: val triplets per category. With at least as many queries as images every image
      occurs in a query, and FashionIQ's two galleries are the same.
    categories: some of "dress", "shirt", "toptee".

  Returns:
    The content of ROOT/demo.json.

  Raises:
    UserError: root exists and is neither empty nor this data set.
    ValueError: an unknown category, or more images or triplets than there are combinations.
  """
  root = pathlib.Path(root).absolute()
  unknown = set(categories) - set(drawing.CATEGORIES)
  if unknown or len(set(categories)) < len(categories) or not categories:
    raise ValueError(
      f"categories: expected different ones of {drawing.CATEGORIES}, got {categories}"
    )
  parameters = {
    "version": _VERSION,
    "seed": seed,
    "image_size": image_size,
    "n_train_images": n_train_images,
    "n_train_triplets": n_train_triplets,
    "n_val_images": n_val_images,
    "n_val_queries": n_val_queries,
    "categories": list(categories),
  }
  summary = _read_existing(root, parameters)
  if summary is not None:
    return summary
  root.parent.mkdir(parents=True, exist_ok=True)
  partial = root.parent / f".{root.name}.{uuid.uuid4().hex[:8]}.partial"
  partial.mkdir()
  try:
    summary = _write(partial, parameters)
    if root.exists():
      root.rmdir()  # empty, or another process was faster; some systems rename onto nothing only
    os.rename(partial, root)
  except OSError:
    # Two processes may have started together: the slower one uses what the faster one wrote.
    summary = _read_existing(root, parameters)
    if summary is None:
      raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return summary
