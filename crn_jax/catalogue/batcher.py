"""Answers the queries of many clients together, by one run of a model's program."""

import concurrent.futures
import queue
import threading

from crn_jax.catalogue.retriever import Query, Retriever
from crn_jax.errors import UserError

# Queries that may wait; more are turned away, as their clients would have left before their turn.
MOST_WAITING = 256


class Batcher:
  """One thread that asks the retriever for whatever waits; closed by `close` or `with`.

  While a batch is under way the next one gathers, so nobody waits for a batch to fill up.
  """

  def __init__(self, retriever: Retriever):
    self._retriever = retriever
    self._waiting = queue.Queue(MOST_WAITING)
    self._thread = threading.Thread(target=self._serve, name="batcher", daemon=True)
    self._thread.start()

  def __enter__(self) -> "Batcher":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def submit(self, query: Query, k: int) -> concurrent.futures.Future:
    """The k best pictures to come: a future of list[Hit], or of the UserError about the query.

    Raises:
      UserError: too many queries wait already.
    """
    future = concurrent.futures.Future()
    try:
      self._waiting.put_nowait((query, k, future))
    except queue.Full:
      raise UserError("too many people search at the moment; try again in a few seconds") from None
    return future

  def close(self) -> None:
    """Returns after everything that was submitted before is answered."""
    self._waiting.put(None)
    self._thread.join()

  def _serve(self) -> None:
    closing = False
    while not closing and (first := self._waiting.get()) is not None:
      asked = [first]
      while len(asked) < self._retriever.batch_size and not self._waiting.empty():
        more = self._waiting.get()
        if more is None:
          closing = True
          break
        asked.append(more)
      self._answer(asked)

  def _answer(self, asked: list[tuple[Query, int, concurrent.futures.Future]]) -> None:
    # Who has cancelled is passed over; the others cannot cancel any more.
    asked = [entry for entry in asked if entry[2].set_running_or_notify_cancel()]
    if not asked:
      return
    try:
      # Shorter rankings are the beginnings of longer ones.
      most = max(k for _, k, _ in asked)
      answers = self._retriever.query_batch([query for query, _, _ in asked], most)
    except Exception as error:  # The thread must outlive it, and the clients must hear of it.
      answers = [error] * len(asked)
    for (_, k, future), answer in zip(asked, answers, strict=True):
      if isinstance(answer, Exception):
        future.set_exception(answer)
      else:
        future.set_result(answer[:k])
