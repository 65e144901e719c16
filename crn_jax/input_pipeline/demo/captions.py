"""Writes the captions of the demo data set (`generate.py`).

A caption names one changed attribute and nothing else, in at most eight words. Texts come in the
two kinds of the CRN paper: *modification* says what changes with respect to the reference ("has
longer sleeves"), *auxiliary* describes the target ("a dress with long sleeves").
"""

import numpy as np

KINDS = ("modification", "auxiliary")

# A value as an adjective ("is ..."), and as a noun phrase ("has ...", "with ...").
_ADJECTIVES = {
  "pattern": {
    "solid": ("solid", "plain"),
    "striped": ("striped",),
    "dotted": ("dotted", "polka dotted"),
    "checked": ("checked", "checkered"),
    "halved": ("two toned", "color blocked"),
  },
  "neckline": {
    "round": ("round", "rounded"),
    "v": ("v shaped",),
    "square": ("square", "squared"),
  },
  "length": {
    "short": ("short", "cropped"),
    "medium": ("medium length", "mid length"),
    "long": ("long", "full length"),
  },
  "hem": {
    "straight": ("straight", "even"),
    "ruffled": ("ruffled", "scalloped", "wavy"),
  },
}
_NOUNS = {
  "pattern": {
    "solid": ("no pattern", "no print"),
    "striped": ("stripes", "a striped pattern"),
    "dotted": ("dots", "polka dots"),
    "checked": ("checks", "a checkered pattern"),
    "halved": ("two tones", "a color blocked design"),
  },
  "sleeves": {
    "sleeveless": ("no sleeves", "no arms"),
    "short": ("short sleeves", "short arms"),
    "long": ("long sleeves", "long arms"),
  },
  "neckline": {
    "round": ("a round neckline", "a crew neck", "a rounded neck"),
    "v": ("a v-neck", "a v shaped neckline", "a v neckline"),
    "square": ("a square neckline", "a square neck"),
  },
  "hem": {
    "straight": ("a straight hem", "an even hem", "a straight bottom edge"),
    "ruffled": ("a ruffled hem", "a scalloped hem", "a wavy bottom edge"),
  },
}
_GARMENTS = {"dress": ("dress", "gown"), "shirt": ("shirt", "blouse"), "toptee": ("top", "tee")}
_NOTHING_NEW = {
  "modification": (
    "is otherwise the same",
    "everything else stays the same",
    "nothing else is different",
    "and the rest is unchanged",
  ),
  "auxiliary": ("a {garment}", "it is a {garment}", "a nice {garment}", "picture of a {garment}"),
}
# What an ordinal change may be called when the reference then leaves one answer only.
_RELATIVE = {
  ("sleeves", "short", "long"): (
    "has longer sleeves",
    "the sleeves are longer",
    "has longer arms",
    "is longer in the sleeves",
  ),
  ("length", "medium", "long"): ("is longer", "has a longer length", "reaches down lower"),
  ("length", "medium", "short"): ("is shorter", "has a shorter length", "ends higher up"),
}

_THAN = ("instead of", "rather than")


def _a(phrase: str) -> str:
  """Puts the indefinite article before a phrase."""
  return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _modification(attribute: str, old: str, new: str) -> list[str]:
  """Every way to say that an attribute changes from `old` to `new`."""
  if attribute == "color":
    return [
      f"is {new} instead of {old}",
      f"is {new} rather than {old}",
      f"is {new} and not {old}",
      f"changes from {old} to {new}",
      f"is {new} in color",
      f"the color is {new}",
    ]
  captions = list(_RELATIVE.get((attribute, old, new), ()))
  subject = {"neckline": "the neckline is", "hem": "the hem is"}.get(attribute, "is")
  adjectives = _ADJECTIVES.get(attribute, {})
  for a in adjectives.get(new, ()):
    captions += [f"{subject} {a} {than} {b}" for b in adjectives[old] for than in _THAN]
    captions.append(f"{subject} now {a}")
  for noun in _NOUNS.get(attribute, {}).get(new, ()):
    captions += [f"has {noun} instead", f"now has {noun}"]
  if attribute == "sleeves":
    captions += [
      f"has {noun} {than} {other}"
      for noun in _NOUNS["sleeves"][new]
      for other in _NOUNS["sleeves"][old]
      for than in _THAN
      if noun.split()[-1] == other.split()[-1]
    ]
    if new == "sleeveless":
      captions += ["is sleeveless", "is now sleeveless", "loses the sleeves"]
  return captions


def _auxiliary(attribute: str, new: str, garment: str) -> list[str]:
  """Every way to say that the target has the value `new`."""
  if attribute == "color":
    return [
      _a(f"{new} {garment}"),
      f"a {garment} in {new}",
      _a(f"{new} colored {garment}"),
      f"the {garment} is {new}",
    ]
  captions = []
  if attribute in ("pattern", "length"):
    for a in _ADJECTIVES[attribute][new]:
      captions += [_a(f"{a} {garment}"), f"the {garment} is {a}"]
  for noun in _NOUNS.get(attribute, {}).get(new, ()):
    captions += [f"a {garment} with {noun}", f"it has {noun}", f"the {garment} has {noun}"]
  if (attribute, new) == ("sleeves", "sleeveless"):
    captions += [f"a sleeveless {garment}", f"the {garment} is sleeveless"]
  return captions


def write(
  rng: np.random.Generator, kind: str, category: str, old: dict[str, str], new: dict[str, str]
) -> list[str]:
  """Writes the two captions of a triplet.

  Args:
    rng: chooses among wordings.
    kind: one of `KINDS`.
    category: "dress", "shirt" or "toptee".
    old: attribute -> value of the reference.
    new: attribute -> value of the target; differs from `old` in one or two attributes.

  Returns:
    Two captions: one for each of two changes, in random order; for a single change two wordings
    of it, or one and a caption that adds nothing.
  """
  garment = str(rng.choice(_GARMENTS[category]))

  def wordings(attribute):
    if kind == "modification":
      return _modification(attribute, old[attribute], new[attribute])
    return _auxiliary(attribute, new[attribute], garment)

  changed = [name for name in new if old[name] != new[name]]
  if len(changed) == 1:
    options = wordings(changed[0])
    captions = [str(c) for c in rng.choice(options, 2, replace=False)]
    if rng.random() < 0.5:
      captions[1] = str(rng.choice(_NOTHING_NEW[kind])).format(garment=garment)
  else:
    captions = [str(rng.choice(wordings(name))) for name in changed]
  return [captions[i] for i in rng.permutation(2)]
