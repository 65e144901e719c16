"""A search as a dialogue: steps that follow each other, and that can be gone back to."""

import dataclasses
import json

# Steps that are kept; the first ones are forgotten then.
MOST = 30


@dataclasses.dataclass(frozen=True)
class Reference:
  """The picture that a step starts from.

  Attributes:
    name: id of a picture of the catalogue, or name of an upload (`thumbnails.Uploads`).
    uploaded: which of the two.
  """

  name: str
  uploaded: bool = False


@dataclasses.dataclass(frozen=True)
class Step:
  """What was asked; nothing of it is the beginning, where some pictures are shown.

  Attributes:
    reference: or None.
    text: modification or description.
    where: filters as JSON, see `conditions.expression`.
    floor: pictures that score less are left out; None for all.
  """

  reference: Reference | None = None
  text: str = ""
  where: str = "{}"
  floor: float | None = None

  @property
  def filters(self) -> dict:
    return json.loads(self.where)

  @property
  def asks(self) -> bool:
    """Whether there is something to look for."""
    return self.reference is not None or bool(self.text)


@dataclasses.dataclass(frozen=True)
class Trail:
  """The steps of a dialogue.

  Attributes:
    steps: from the first one on.
    at: index of the step that is shown.
  """

  steps: tuple[Step, ...] = (Step(),)
  at: int = 0

  @property
  def current(self) -> Step:
    return self.steps[self.at]

  def asked(self, step: Step) -> "Trail":
    """With a step after the current one, whose later ones are dropped; the same step is no new one.

    A step that asks for the same with other filters takes the current one's place.
    """
    if step == self.current:
      return self
    before = self.steps[: self.at + 1]
    if (step.reference, step.text) == (self.current.reference, self.current.text):
      before = before[:-1]
    steps = (*before, step)[-MOST:]
    return Trail(steps, len(steps) - 1)

  def back_to(self, at: int) -> "Trail":
    """At another step; as it is if there is no such one."""
    return dataclasses.replace(self, at=at) if 0 <= at < len(self.steps) else self
