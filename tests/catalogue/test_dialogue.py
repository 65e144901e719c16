"""The steps of a dialogue."""

import pytest

from crn_jax.catalogue.page import dialogue
from crn_jax.catalogue.page.dialogue import Reference, Step, Trail

RED, BLUE = Step(text="red"), Step(Reference("7"), "blue")


def test_begins_with_nothing_asked():
  assert Trail().current == Step()
  assert not Trail().current.asks
  assert RED.asks
  assert Step(Reference("7")).asks
  assert not Step(where='{"kind": ["dress"]}', floor=0.5).asks


def test_steps_follow_each_other_and_can_be_gone_back_to():
  trail = Trail().asked(RED).asked(BLUE)
  assert trail == Trail((Step(), RED, BLUE), 2)
  assert trail.asked(BLUE) == trail  # Asked once more.
  back = trail.back_to(1)
  assert back.current == RED
  assert back.steps == trail.steps  # What came after can still be gone to ...
  assert back.back_to(2) == trail
  green = Step(text="green")
  assert back.asked(green) == Trail((Step(), RED, green), 2)  # ... until something else is asked.


def test_another_filter_is_no_other_step():
  trail = Trail().asked(RED)
  filtered = Step(text="red", where='{"kind": ["dress"]}')
  assert trail.asked(filtered) == Trail((Step(), filtered), 1)


@pytest.mark.parametrize("at", [-1, 3, 99])
def test_a_step_that_is_not_there_is_not_gone_to(at):
  trail = Trail().asked(RED).asked(BLUE)
  assert trail.back_to(at) == trail


def test_the_first_steps_are_forgotten():
  trail = Trail()
  for i in range(2 * dialogue.MOST):
    trail = trail.asked(Step(text=str(i)))
  assert len(trail.steps) == dialogue.MOST
  assert trail.current.text == str(2 * dialogue.MOST - 1)


def test_filters_are_read_back():
  assert Step(where='{"price": {"least": 3}}').filters == {"price": {"least": 3}}
