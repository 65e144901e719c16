"""A catalogue's page in this process, and a browser to look at it."""

import contextlib
import pathlib
import threading

import pytest

from crn_jax.catalogue import encoders, indexing, model
from crn_jax.catalogue.retriever import Retriever
from crn_jax.catalogue.store import Store
from tests.catalogue import made

N = 12
# Names that would do harm if they became HTML, a template of Gradio's page or a filter.
HOSTILE = (
  '<img src=x onerror="window.hurt=1">',
  "${window.hurt=1}{{window.hurt=1}}",
  '" or 1 == 1',
)


def catalogue(root: pathlib.Path) -> pathlib.Path:
  """Makes a run with made-up weights and a catalogue of N pictures with metadata."""
  made.trained(root / "run")
  made.folder(root / "pictures", N)
  lines = ["id,path,kind,price"]
  for i in range(N):
    identifier = HOSTILE[i] if i < len(HOSTILE) else f"{i:02d}"
    kind = HOSTILE[0] if i == 0 else ("dress", "shirt", "hat")[i % 3]
    cells = [identifier, f"pictures/{i}.png", kind, str(i)]
    lines.append(",".join('"' + cell.replace('"', '""') + '"' for cell in cells))
  (root / "list.csv").write_text("\n".join(lines))
  with Store(root / "a.db", create=True) as store:
    indexing.update(store, encoders.Encoders(model.load(root / "run")), root / "list.csv")
  return root


@contextlib.contextmanager
def page(retriever: Retriever, host: str = "127.0.0.1"):
  """Serves; the address is given."""
  from crn_jax.catalogue.page import server

  with (
    server.listening(host, 0) as bound,
    server.application(retriever, "things", host) as app,
  ):
    serving = server.server_of(app)
    thread = threading.Thread(target=serving.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
      yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
      serving.should_exit = True
      thread.join()


@contextlib.contextmanager
def browser():
  """Chromium of the system; skips where it or Playwright is not installed."""
  path = pathlib.Path("/usr/bin/chromium")
  if not path.exists():
    pytest.skip(f"no browser: {path} is not there (apt-get install chromium)")
  sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
  with sync_api.sync_playwright() as playwright:
    opened = playwright.chromium.launch(executable_path=str(path), args=["--no-sandbox"])
    yield opened
    opened.close()
