"""What is missing or damaged in a data folder, in words and in counts.

Readers collect `Problem`s instead of stopping at the first; `error_message` is what people see
before training starts, `describe_skipped` what they see below every result when they went on
without.
"""

import collections
import dataclasses
from collections.abc import Sequence

FATAL = "fatal"
ENTRIES_MALFORMED = "entries_malformed"
ENTRIES_OUTSIDE_SPLIT = "entries_outside_split"
IMAGES_UNREADABLE = "images_unreadable"
IMAGES_MISSING = "images_missing"

# The sorts that can be skipped, in the order in which they are listed: singular, plural.
SKIPPABLE = {
  ENTRIES_MALFORMED: ("entry is malformed", "entries are malformed"),
  ENTRIES_OUTSIDE_SPLIT: (
    "entry names an image outside its split list",
    "entries name an image outside their split list",
  ),
  IMAGES_UNREADABLE: ("image file cannot be read", "image files cannot be read"),
  IMAGES_MISSING: ("image has no file", "images have no file"),
}

_MAX_LISTED = 10
_FETCH_FATAL = "Fetch those files again; docs/data.md says from where and what is expected."
_FETCH = "Fetch these files again (docs/data.md says what is expected)."


@dataclasses.dataclass(frozen=True)
class Problem:
  """One thing that is wrong.

  Attributes:
    sort: `FATAL` (nothing can go on without it) or a key of `SKIPPABLE`.
    where: file below the root, with the item; for a missing image its category and id.
    what: what is wrong with it; "" where the sort says it all.
    mend: how to mend it, in a sentence; None where fetching the file again does, "" where it
      follows from the other problems.
  """

  sort: str
  where: str
  what: str = ""
  mend: str | None = None

  def __str__(self) -> str:
    return f"{self.where}: {self.what}" if self.what else self.where


def count(problems: Sequence[Problem]) -> dict[str, int]:
  """Number of different problems of each sort that can be skipped, zeros included."""
  counts = collections.Counter(p.sort for p in dict.fromkeys(problems))
  return {sort: counts[sort] for sort in SKIPPABLE}


def error_message(root: str, problems: Sequence[Problem], skipped: dict, looked_for: str) -> str:
  """What is wrong and how to go on.

  Args:
    root: the data folder.
    problems: at least one; each is named once. All fatal ones are listed, and the first ten of
      each other sort.
    skipped: what going on without would cost, as in `describe_skipped`.
    looked_for: where image files were looked for.
  """
  by_sort = collections.defaultdict(list)
  for problem in dict.fromkeys(problems):
    by_sort[problem.sort].append(problem)
  lines = [f"{root}: data are missing or damaged.", ""]
  fatal = by_sort[FATAL]
  if fatal:
    lines.append("These must be mended, they cannot be skipped:")
    lines += [f"  {p}" for p in fatal]
  for sort, (singular, plural) in SKIPPABLE.items():
    found = by_sort[sort]
    if not found:
      continue
    reasons = collections.Counter(p.what.partition(":")[0] for p in found)
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
    detail = {IMAGES_UNREADABLE: f" ({reasons})", IMAGES_MISSING: f" ({looked_for})"}.get(sort, "")
    lines.append(f"{len(found):,} {singular if len(found) == 1 else plural}{detail}:")
    lines += [f"  {p}" for p in found[:_MAX_LISTED]]
    if len(found) > _MAX_LISTED:
      lines.append(f"  ... and {len(found) - _MAX_LISTED:,} more")
  others = [p for sort in SKIPPABLE for p in by_sort[sort]]
  lines.append("")
  lines += _mends(fatal, _FETCH_FATAL)
  if fatal and others and all(p.mend != "" for p in fatal):
    lines.append("The rest can then be left out with --config.data.on_missing=skip.")
  else:
    lines += _mends(others, _FETCH)
  if not fatal:
    lines.append("Or go on without what they affect by --config.data.on_missing=skip:")
    affected = describe_skipped(skipped) or "no triplet, query or gallery image"
    lines += [f"  {line}" for line in affected.splitlines()]
  elif not lines[-1]:
    lines.append(_FETCH_FATAL)
  return "\n".join(lines)


def _mends(problems: Sequence[Problem], usual: str) -> list[str]:
  """How to mend problems, each sentence once."""
  mends = dict.fromkeys(usual if p.mend is None else p.mend for p in problems)
  return [mend for mend in mends if mend]


def describe_skipped(skipped: dict) -> str:
  """What was left out, in one or two lines for people; "" if nothing was.

  Args:
    skipped: as in `dataset.Dataset`.
  """
  lines = []
  if skipped.get("train", {}).get("triplets"):
    lines.append(f"skipped in train: {_of(skipped['train'], 'triplets')} triplets")
  parts = []
  for category, counts in skipped.get("val", {}).items():
    lost = [f"{_of(counts, 'queries')} queries"] if counts["queries"] else []
    lost += [
      f"{_of(counts, gallery)} {gallery} images"
      for gallery in counts
      if gallery != "queries" and f"of_{gallery}" in counts and counts[gallery]
    ]
    if lost:
      parts.append(f"{category} {', '.join(lost)}")
  if parts:
    lines.append(f"skipped in val: {'; '.join(parts)}")
  return "\n".join(lines)


def _of(counts: dict, key: str) -> str:
  return f"{counts[key]:,} of {counts[f'of_{key}']:,}"
