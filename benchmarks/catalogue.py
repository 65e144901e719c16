"""Indexing and asking a catalogue: pictures a second, memory, latency alone and under load.

PYTHONPATH=. python benchmarks/catalogue.py --model=runs/demo_crn

Draws pictures, indexes them, and asks composed queries (a picture file and a text): one client at a
time, then several at once, whose waiting requests are answered together, as a server does with
`Retriever.query_batch`. Prints a line of JSON for each.
"""

import json
import pathlib
import queue
import tempfile
import threading
import time

import numpy as np
from absl import app, flags

from crn_jax.catalogue import encoders, indexing, model
from crn_jax.catalogue.retriever import Query, Retriever
from crn_jax.catalogue.store import Store
from crn_jax.errors import UserError
from crn_jax.input_pipeline.demo import generate
from crn_jax.workdir import logs

_MODEL = flags.DEFINE_string("model", "runs/demo_crn", "Folder of a trained run.")
_PICTURES = flags.DEFINE_integer("pictures", 10_000, "Pictures.", lower_bound=3)
_CLIENTS = flags.DEFINE_integer("clients", 16, "Clients at once.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Queries of a program.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Of each measurement.")

TEXTS = ("is red", "is blue with long sleeves", "has no pattern", "is shorter and green")


def indexed(folder: pathlib.Path, ready: encoders.Encoders, n: int) -> dict:
  """Draws n pictures and indexes them: pictures a second, and memory beyond what was there."""
  each = -(-n // 3)
  n_val = min(each // 2, 720)
  generate.generate(
    folder / "data", n_train_images=each - n_val, n_train_triplets=1, n_val_images=n_val,
    n_val_queries=n_val,
  )  # fmt: skip
  paths = sorted((folder / "data" / "images").iterdir())[:n]
  (folder / "list.csv").write_text("path\n" + "".join(f"{path}\n" for path in paths))
  ready.image_vectors([ready.empty_picture], indexing.BATCH_SIZE)  # Compiled.
  before = logs.peak_memory_gib()
  with Store(folder / "catalogue.db", create=True) as store:
    report = indexing.update(store, ready, folder / "list.csv")
  return {
    "measured": "index",
    "pictures": report.total,
    "pictures_per_second": report.encoded / report.seconds,
    "peak_gib": logs.peak_memory_gib(),
    "gib_beyond_the_model": logs.peak_memory_gib() - before,
  }


class Batcher:
  """Answers what waits, together; one thread asks the retriever."""

  def __init__(self, retriever: Retriever):
    self._retriever, self._waiting = retriever, queue.SimpleQueue()
    self._thread = threading.Thread(target=self._serve)
    self._thread.start()

  def ask(self, query: Query):
    """Waits for the answer."""
    answer = queue.SimpleQueue()
    self._waiting.put((query, answer))
    return answer.get()

  def close(self) -> None:
    self._waiting.put(None)
    self._thread.join()

  def _serve(self) -> None:
    while (first := self._waiting.get()) is not None:
      asked = [first]
      while len(asked) < self._retriever.batch_size and not self._waiting.empty():
        more = self._waiting.get()
        if more is None:
          self._waiting.put(None)
          break
        asked.append(more)
      answers = self._retriever.query_batch([query for query, _ in asked])
      for (_, answer), found in zip(asked, answers, strict=True):
        answer.put(found)


def load(retriever: Retriever, paths: list[str], clients: int, seconds: float) -> dict:
  """Clients that ask again as soon as they are answered."""
  batcher, latencies, errors = Batcher(retriever), [], []
  stop = time.monotonic() + seconds

  def client(number: int) -> None:
    rng = np.random.default_rng(number)
    while time.monotonic() < stop:
      query = Query(paths[rng.integers(len(paths))], TEXTS[rng.integers(len(TEXTS))])
      start = time.monotonic()
      found = batcher.ask(query)
      latencies.append(time.monotonic() - start)
      if isinstance(found, UserError) or len(found) != 10:
        errors.append(found)

  start = time.monotonic()
  threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  took = time.monotonic() - start
  batcher.close()
  p50, p95 = np.percentile(latencies, [50, 95])
  return {
    "measured": "query",
    "clients": clients,
    "queries": len(latencies),
    "errors": len(errors),
    "queries_per_second": len(latencies) / took,
    "p50_ms": 1e3 * p50,
    "p95_ms": 1e3 * p95,
  }


def main(argv):
  del argv
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    ready = encoders.Encoders(model.load(_MODEL.value))
    print(json.dumps(indexed(folder, ready, _PICTURES.value)), flush=True)
    start = time.monotonic()
    with Retriever.open(folder / "catalogue.db", batch_size=_BATCH.value) as retriever:
      retriever.warm()
      opened = {"measured": "open", "seconds": time.monotonic() - start}
      print(json.dumps(opened), flush=True)
      paths = [row.path for row in retriever.sample(min(500, _PICTURES.value))]
      for clients in dict.fromkeys((1, _CLIENTS.value)):
        print(json.dumps(load(retriever, paths, clients, _SECONDS.value)), flush=True)


if __name__ == "__main__":
  app.run(main)
