"""Indexing and asking a catalogue: pictures a second, memory, latency alone and under load.

PYTHONPATH=. python benchmarks/catalogue.py --model=runs/demo_crn

Draws pictures, indexes them, and asks composed queries (a picture of the catalogue and a text): one
client at a time, then several at once, whose waiting requests are answered together; in this
process, then over HTTP from the page's server in another one (--nohttp leaves that out). Prints a
line of JSON for each.
"""

import contextlib
import http.client
import json
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid

import numpy as np
from absl import app, flags

from crn_jax.catalogue import encoders, indexing, model
from crn_jax.catalogue.batcher import Batcher
from crn_jax.catalogue.retriever import Query, Retriever
from crn_jax.catalogue.store import Store
from crn_jax.errors import UserError
from crn_jax.input_pipeline.demo import generate
from crn_jax.workdir import logs

_MODEL = flags.DEFINE_string("model", "runs/demo_crn", "Folder of a trained run.")
_PICTURES = flags.DEFINE_integer("pictures", 10_000, "Pictures.", lower_bound=3)
_CLIENTS = flags.DEFINE_integer("clients", 16, "Clients at once.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 16, "Queries of a program.", lower_bound=1)
_HTTP = flags.DEFINE_bool("http", True, "Whether to ask the page's server, too.")
_SECONDS = flags.DEFINE_float("seconds", 10.0, "Of each measurement.")

MAIN = pathlib.Path(__file__).parents[1] / "main.py"
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


def load(ask, ids: list[str], clients: int, seconds: float) -> dict:
  """Clients that ask again as soon as they are answered: composed queries, ten pictures each.

  Args:
    ask: makes a client: a function of id and text that gives the number of pictures found.
    ids: of pictures that are asked with.
    clients: how many at once.
    seconds: for how long.
  """
  latencies, errors = [], []
  stop = time.monotonic() + seconds

  def client(number: int) -> None:
    rng, asked = np.random.default_rng(number), ask()
    while time.monotonic() < stop:
      given = ids[rng.integers(len(ids))], TEXTS[rng.integers(len(TEXTS))]
      start = time.monotonic()
      try:
        found = asked(*given)
      except (UserError, OSError, ValueError) as error:
        found = repr(error)
      latencies.append(time.monotonic() - start)
      if found != 10:
        errors.append(found)

  start = time.monotonic()
  threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  took = time.monotonic() - start
  p50, p95 = np.percentile(latencies, [50, 95])
  return {
    "clients": clients,
    "queries": len(latencies),
    "errors": len(errors),
    "queries_per_second": len(latencies) / took,
    "p50_ms": 1e3 * p50,
    "p95_ms": 1e3 * p95,
  }


def over_http(netloc: str):
  """A client of the page's API: one connection, one session."""
  connection, session = http.client.HTTPConnection(netloc, timeout=60), uuid.uuid4().hex

  def ask(identifier: str, text: str) -> int:
    arguments = [None, text, identifier, None, 10, None]
    body = json.dumps({"data": arguments, "session_hash": session})
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/gradio_api/run/search", body, headers)
    answer = connection.getresponse()
    content = answer.read()
    if answer.status != 200:
      raise ValueError(content)
    return len(json.loads(content)["data"][0]["hits"])

  return ask


@contextlib.contextmanager
def served(index: pathlib.Path):
  """Serves the page in another process; its host and port."""
  command = [sys.executable, str(MAIN), "--mode=serve", f"--index={index}", "--port=0",
             f"--batch_size={_BATCH.value}"]  # fmt: skip
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    line = process.stdout.readline()
    try:
      yield re.search(r"http://(\S+)", line)[1]
    finally:
      process.send_signal(signal.SIGINT)
      process.communicate()


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
      ids = [row.id for row in retriever.sample(min(500, _PICTURES.value))]
      with Batcher(retriever) as batcher:

        def ask(identifier: str, text: str) -> int:
          return len(batcher.submit(Query(id=identifier, text=text), 10).result())

        measure("query", lambda: ask, ids)
    if not _HTTP.value:
      return
    with served(folder / "catalogue.db") as netloc:
      measure("http", lambda: over_http(netloc), ids)


def measure(measured: str, ask, ids: list[str]) -> None:
  for clients in dict.fromkeys((1, _CLIENTS.value)):
    found = load(ask, ids, clients, _SECONDS.value)
    print(json.dumps({"measured": measured, **found}), flush=True)


if __name__ == "__main__":
  app.run(main)
