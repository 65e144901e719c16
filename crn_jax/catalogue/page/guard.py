"""What is let in to the page's application, before anything else looks at it."""

import contextlib
import json
import os
from collections.abc import Iterator

from starlette.responses import PlainTextResponse

from crn_jax.catalogue import pictures

# Bytes of a request: an upload with what surrounds it; anything else.
_MOST_UPLOAD, _MOST = pictures.MAX_UPLOAD + 100_000, 1_000_000
# Bytes of all uploads that Gradio keeps at a time: it removes them after some minutes.
MOST_KEPT = 1_000_000_000

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


class Guard:
  """ASGI middleware: bounds requests in bytes and in the files they name; adds headers.

  Gradio reads the files that the values of a request name, and fetches addresses. Inside another
  application it does not look where they lie, so it is looked at here: they must be uploads.
  """

  def __init__(self, app, uploads: str):
    """`uploads`: folder into which Gradio puts what is uploaded."""
    self._app, self._uploads = app, os.path.realpath(uploads)

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return

    async def send_with_headers(message):
      if message["type"] == "http.response.start":
        message["headers"] = [*message.get("headers", ()), *_HEADERS.items()]
      await send(message)

    is_upload = scope["path"] == "/gradio_api/upload"
    most = _MOST_UPLOAD if is_upload else _MOST
    length = dict(scope["headers"]).get(b"content-length", b"")
    if not length.isdigit() and (is_upload or length):
      refused = PlainTextResponse("The length of the request is not said.\n", 411)
    elif length and int(length) > most:
      refused = PlainTextResponse(f"At most {most:,} bytes are taken.\n", 413)
    elif is_upload and _size(self._uploads) + int(length) > MOST_KEPT:
      refused = PlainTextResponse("Too much was uploaded; try again in some minutes.\n", 503)
    elif is_upload or scope["method"] in ("GET", "HEAD"):
      refused = None  # Servers pass on no more than was said.
    else:
      body = await _read(receive, most)
      receive = _again(body, receive)
      refused = self._refused(body, most)
    await (refused or self._app)(scope, receive, send_with_headers)

  def _refused(self, body: bytes, most: int) -> PlainTextResponse | None:
    if len(body) > most:
      return PlainTextResponse(f"At most {most:,} bytes are taken.\n", 413)
    try:
      named = list(_paths(json.loads(body or b"null")))
    except (ValueError, RecursionError):
      return PlainTextResponse("JSON is expected.\n", 400)
    if all(self._is_upload(path) for path in named):
      return None
    return PlainTextResponse("A file must be uploaded first; no other one is read.\n", 403)

  def _is_upload(self, path: str) -> bool:
    # A path with a null byte is none.
    return "\0" not in path and os.path.realpath(path).startswith(self._uploads + os.sep)


def _size(folder: str) -> int:
  """Bytes of the files below a folder, some of which may vanish meanwhile."""
  total = 0
  for parent, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(OSError):
        total += os.lstat(os.path.join(parent, name)).st_size
  return total


def _paths(value: object) -> Iterator[str]:
  """The files that a value names, in the way of Gradio, anywhere inside it."""
  waiting = [value]
  while waiting:
    value = waiting.pop()
    if isinstance(value, dict):
      if isinstance(value.get("path"), str):
        yield value["path"]
      waiting += value.values()
    elif isinstance(value, list):
      waiting += value


async def _read(receive, most: int) -> bytes:
  """The body of a request, or a bit more than `most` bytes of a longer one."""
  body = b""
  while len(body) <= most:
    message = await receive()
    body += message.get("body", b"")
    if not message.get("more_body"):
      break
  return body


def _again(body: bytes, receive):
  """A `receive` that gives the body, and then what follows it."""
  given = False

  async def give():
    nonlocal given
    if given:
      return await receive()
    given = True
    return {"type": "http.request", "body": body, "more_body": False}

  return give
