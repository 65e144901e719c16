"""Serves the page: the application around Gradio, what it lets in, and where it listens."""

import contextlib
import ipaddress
import os
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
from crn_jax.catalogue.page import blocks
from crn_jax.catalogue.page.thumbnails import Thumbnails, Uploads
from crn_jax.catalogue.retriever import Retriever
from crn_jax.errors import UserError

# Bytes of a request: an upload with what surrounds it; anything else.
_MOST_UPLOAD, _MOST = pictures.MAX_UPLOAD + 100_000, 1_000_000

# The browser itself then asks no other host for anything. Gradio makes functions out of texts.
_POLICY = (
  "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
  "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
  "media-src 'self' blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
  "form-action 'self'; frame-ancestors 'self'"
)
_HEADERS = {
  b"content-security-policy": _POLICY.encode(),
  b"x-content-type-options": b"nosniff",
  b"referrer-policy": b"no-referrer",
}


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

  app.add_middleware(_Guard)
  if _is_local(host):
    names = ["localhost", "127.0.0.1", "[::1]", host]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)
  with (
    Batcher(retriever) as batcher,
    tempfile.TemporaryDirectory(prefix="crn_jax_page_") as folder,
    _environment(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False"),
  ):
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


class _Guard:
  """Bounds requests in bytes, and adds headers to answers."""

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    most = _MOST_UPLOAD if scope["path"] == "/gradio_api/upload" else _MOST
    started, taken = False, 0

    async def receive_some():
      nonlocal taken
      message = await receive()
      taken += len(message.get("body", b""))
      if taken > most:
        raise _TooLarge
      return message

    async def send_with_headers(message):
      nonlocal started
      if message["type"] == "http.response.start":
        started = True
        message["headers"] = [*message.get("headers", ()), *_HEADERS.items()]
      await send(message)

    async def send_some(message):
      # What the application makes of a body that breaks off is not to be said.
      if taken <= most or started:
        await send_with_headers(message)

    too_large = PlainTextResponse(f"At most {most:,} bytes are taken.\n", 413)
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if not length.isdigit() or int(length) > most:
      await too_large(scope, receive, send_with_headers)
      return
    with contextlib.suppress(_TooLarge):
      await self._app(scope, receive_some, send_some)
    if taken > most and not started:
      await too_large(scope, receive, send_with_headers)


class _TooLarge(Exception):
  """More bytes came than are taken."""


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
