"""Queries of many clients are answered together, each with its own answer."""

import threading

import pytest

from crn_jax.catalogue import batcher
from crn_jax.catalogue.batcher import Batcher
from crn_jax.catalogue.retriever import Query
from crn_jax.errors import UserError


class Slow:
  """In the place of a retriever: answers when it is let."""

  batch_size = 4

  def __init__(self):
    self.batches, self.go, self.entered = [], threading.Event(), threading.Event()

  def query_batch(self, queries, k):
    self.entered.set()
    assert self.go.wait(30)
    texts = [query.text for query in queries]
    self.batches.append((texts, k))
    if "fail" in texts:
      raise RuntimeError("a fault")
    return [UserError("bad") if t == "bad" else [f"{t}{i}" for i in range(k)] for t in texts]


@pytest.fixture
def slow():
  return Slow()


def submit(asked: Batcher, slow: Slow, texts: str, k: int = 2):
  """Submits a first query, and the others while it is under way."""
  futures = [asked.submit(Query(text=texts[0]), k)]
  assert slow.entered.wait(30)
  futures += [asked.submit(Query(text=text), k) for text in texts[1:]]
  slow.go.set()
  return futures


def test_what_waits_is_answered_together(slow):
  with Batcher(slow) as asked:
    futures = submit(asked, slow, "abcdef")
    assert [f.result(30) for f in futures] == [[f"{t}0", f"{t}1"] for t in "abcdef"]
  assert slow.batches == [(["a"], 2), (["b", "c", "d", "e"], 2), (["f"], 2)]


def test_each_gets_as_many_as_it_asked_for(slow):
  slow.go.set()
  with Batcher(slow) as asked:
    futures = [asked.submit(Query(text="a"), k) for k in (1, 5, 2)]
    assert [len(f.result(30)) for f in futures] == [1, 5, 2]


def test_an_error_is_of_its_query_alone(slow):
  with Batcher(slow) as asked:
    first = asked.submit(Query(text="a"), 1)
    assert slow.entered.wait(30)
    futures = [asked.submit(Query(text=text), 1) for text in ("b", "bad", "c")]
    slow.go.set()
    assert [f.result(30) for f in (first, futures[0], futures[2])] == [["a0"], ["b0"], ["c0"]]
    with pytest.raises(UserError, match="bad"):
      futures[1].result(30)


def test_a_fault_is_heard_of_and_the_next_query_answered(slow):
  slow.go.set()
  with Batcher(slow) as asked:
    with pytest.raises(RuntimeError, match="a fault"):
      asked.submit(Query(text="fail"), 1).result(30)
    assert asked.submit(Query(text="a"), 1).result(30) == ["a0"]


def test_who_has_left_is_not_answered(slow):
  with Batcher(slow) as asked:
    first = asked.submit(Query(text="a"), 1)
    assert slow.entered.wait(30)
    left, stays = asked.submit(Query(text="b"), 1), asked.submit(Query(text="c"), 1)
    assert left.cancel()
    slow.go.set()
    assert (first.result(30), stays.result(30)) == (["a0"], ["c0"])
  assert slow.batches == [(["a"], 1), (["c"], 1)]


def test_too_many_are_turned_away(slow, monkeypatch):
  monkeypatch.setattr(batcher, "MOST_WAITING", 2)
  with Batcher(slow) as asked:
    asked.submit(Query(text="a"), 1)
    assert slow.entered.wait(30)
    waiting = [asked.submit(Query(text="b"), 1) for _ in range(2)]
    with pytest.raises(UserError, match="try again"):
      asked.submit(Query(text="c"), 1)
    slow.go.set()
    assert [f.result(30) for f in waiting] == [["b0"]] * 2


def test_closing_answers_what_was_asked(slow):
  slow.go.set()
  with Batcher(slow) as asked:
    futures = [asked.submit(Query(text=text), 1) for text in "abc"]
  assert [f.result(0) for f in futures] == [["a0"], ["b0"], ["c0"]]
