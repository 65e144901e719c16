"""Serves the page: the application around Gradio, what it lets in, and where it listens."""

import contextlib
import ipaddress
import os
import signal
import socket
import tempfile
from collections.abc import Iterator

import fastapi
import gradio as gr
import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

from crn_jax.catalogue import pictures
from crn_jax.catalogue.batcher import Batcher
from crn_jax.catalogue.page import blocks, guard
from crn_jax.catalogue.page.thumbnails import Thumbnails, Uploads
from crn_jax.catalogue.retriever import Retriever
from crn_jax.errors import UserError


@contextlib.contextmanager
def application(retriever: Retriever, name: str, host: str) -> Iterator[fastapi.FastAPI]:
  """The application of a catalogue, with its folder for uploads, which goes with it.

  Args:
    retriever: the open catalogue.
    name: of the catalogue, for people.
    host: where it will listen; on this machine alone, other names of it are refused, so that no
      web page can reach it under a name of its own.
  """
  app = fastapi.FastAPI(openapi_url=None)
  thumbnails, uploads = Thumbnails(retriever), Uploads()

  # Plain functions, which run in threads.
  @app.get("/picture")
  def picture(id: str):
    return _jpeg(thumbnails.get, id)

  @app.get("/upload")
  def upload(id: str):
    return _jpeg(uploads.thumbnail, id)

  with (
    Batcher(retriever) as batcher,
    tempfile.TemporaryDirectory(prefix="crn_jax_page_") as folder,
    _environment(
      GRADIO_TEMP_DIR=folder,
      GRADIO_ANALYTICS_ENABLED="False",
      # Else all requests so far are summed up after each one, which is most of its time.
      GRADIO_ANALYTICS_CACHE_FREQUENCY="1000000",
      GRADIO_ANALYTICS_MAX_EVENTS="100",
    ),
  ):
    app.add_middleware(guard.Guard, uploads=folder)
    if _is_local(host):
      names = ["localhost", "127.0.0.1", "[::1]", host]
      app.add_middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
    page = blocks.Page(retriever, batcher, uploads, name)
    yield gr.mount_gradio_app(
      app, page.blocks, path="/", server_name=host, ssr_mode=False, show_error=False,
      max_file_size=pictures.MAX_UPLOAD, allowed_paths=[], footer_links=["api"],
      run_history=False, enable_monitoring=False, pwa=False, mcp_server=False,
      theme=blocks.theme(), css=blocks.CSS, head=blocks.HEAD,
    )  # fmt: skip


def serve(retriever: Retriever, name: str, host: str, port: int) -> None:
  """Serves until it is interrupted.

  Raises:
    UserError: it cannot listen there.
  """
  with listening(host, port) as bound, application(retriever, name, host) as app:
    port = bound.getsockname()[1]
    print(f"{len(retriever):,} pictures: open http://{_in_url(host)}:{port} (Ctrl-C ends it)")
    if not _is_local(host):
      print(
        f"note: with --host={host} everybody who reaches this machine at port {port} can see and "
        f"search all pictures of the catalogue, without a password and unencrypted. Let a firewall "
        f"or a proxy with passwords and HTTPS stand before it, or leave --host away"
      )
    print(end="", flush=True)
    # As Ctrl-C, so that what is temporary goes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
      server_of(app).run(sockets=[bound])


def server_of(app: fastapi.FastAPI) -> uvicorn.Server:
  return uvicorn.Server(
    uvicorn.Config(
      app, log_level="warning", server_header=False, timeout_graceful_shutdown=1,
      limit_concurrency=500,
    )
  )  # fmt: skip


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
  """A socket that listens.

  Raises:
    UserError: the port is taken or not allowed, or the address is not of this machine.
  """
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    bound = socket.create_server((host, port), family=family)
  except (OSError, OverflowError) as error:
    reason = getattr(error, "strerror", None) or error
    raise UserError(
      f"--host={host} --port={port}: cannot listen there ({reason}); choose another --port, e.g. "
      f"--port={port + 1 if 0 < port < 65_535 else 7860}"
    ) from error
  with bound:
    yield bound


def _jpeg(get, name: str) -> fastapi.Response:
  try:
    content = get(name)
  except UserError:
    # Not the message, which may name a path on this machine.
    return PlainTextResponse("no such picture, or it has changed", 404)
  return fastapi.Response(content, media_type="image/jpeg",
                          headers={"cache-control": "private, max-age=600"})  # fmt: skip


def _is_local(host: str) -> bool:
  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host.strip("[]")).is_loopback
  except ValueError:
    return False


def _in_url(host: str) -> str:
  return f"[{host}]" if ":" in host else host


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
  """Sets variables of the environment for a while; Gradio has no other way to be told these."""
  before = {name: os.environ.get(name) for name in values}
  os.environ.update(values)
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        os.environ.pop(name)
      else:
        os.environ[name] = value
