"""What the server of a page lets in and out, its API, and the command that starts it."""

import concurrent.futures
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import urllib.parse
import zlib

import numpy as np
import pytest

from crn_jax.catalogue.retriever import Retriever
from crn_jax.errors import UserError
from tests.catalogue import served

pytest.importorskip("gradio")
gradio_client = pytest.importorskip("gradio_client")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

REPOSITORY = pathlib.Path(__file__).parents[2]
DOCS = (REPOSITORY / "docs" / "catalogue.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  root = served.catalogue(tmp_path_factory.mktemp("serving"))
  shutil.copytree(root / "a.db", root / "b.db")  # Which no process has open.
  return root


@pytest.fixture(scope="module")
def retriever(place):
  with Retriever.open(place / "a.db", batch_size=4) as opened:
    yield opened


@pytest.fixture(scope="module")
def asked_for():
  """Hosts whose addresses this process has looked up, or that it has connected to, since."""
  hosts = set()
  with pytest.MonkeyPatch.context() as patch:
    look_up = socket.getaddrinfo

    def recorded(host, *args, **kwargs):
      hosts.add(host.decode() if isinstance(host, bytes) else host)
      return look_up(host, *args, **kwargs)

    patch.setattr(socket, "getaddrinfo", recorded)
    yield hosts


@pytest.fixture(scope="module")
def url(retriever, asked_for):
  with served.page(retriever) as address:
    yield address


@pytest.fixture(scope="module")
def client(url):
  return gradio_client.Client(url, verbose=False)


def request(url: str, path: str, method="GET", **options) -> tuple[int, bytes, dict]:
  """Status, content and headers; the path goes out as it is."""
  connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
  connection.request(method, path, **options)
  answer = connection.getresponse()
  found = answer.status, answer.read(), dict(answer.getheaders())
  connection.close()
  return found


def upload(url: str, content: bytes) -> tuple[int, bytes, dict]:
  """What the server answers to an upload."""
  body = (
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    + content + b"\r\n--x--\r\n"
  )  # fmt: skip
  headers = {"Content-Type": "multipart/form-data; boundary=x"}
  return request(url, "/gradio_api/upload", "POST", body=body, headers=headers)


def ask(url: str, image=None, text="", where=None) -> str:
  """What the server says, without the client, which would upload the files that it finds."""
  body = json.dumps({"data": [image, text, None, where, 10, None]})
  headers = {"Content-Type": "application/json"}
  status, content, _ = request(url, "/gradio_api/call/search", "POST", body=body, headers=headers)
  if status != 200:
    return f"event: error {content.decode()}"
  event = json.loads(content)["event_id"]
  return request(url, f"/gradio_api/call/search/{event}")[1].decode()


def file_of(path) -> dict:
  return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def picture(url: str, identifier: str, route="picture") -> int:
  return request(url, f"/{route}?id={urllib.parse.quote(identifier, safe='')}")[0]


def test_no_other_host_is_asked(url, asked_for, place):
  """Names of hosts are looked up before they are asked. The first test, as the client asks one."""
  for path in ("/", "/config", "/theme.css", "/picture?id=05", "/gradio_api/info"):
    assert request(url, path)[0] == 200
  (uploaded,) = json.loads(upload(url, (place / "pictures" / "5.png").read_bytes())[1])
  assert "event: complete" in ask(url, file_of(uploaded), "is red")
  assert {"127.0.0.1"} <= asked_for <= {"127.0.0.1", "localhost"}


class TestLetsOut:
  def test_pictures_of_the_catalogue_by_their_ids(self, url):
    status, content, headers = request(url, "/picture?id=05")
    assert (status, headers["content-type"]) == (200, "image/jpeg")
    assert content.startswith(b"\xff\xd8")
    for name in served.HOSTILE:
      assert picture(url, name) == 200

  def test_nothing_else(self, url, place):
    inside = [str(place / "pictures" / "5.png"), "pictures/5.png", str(place / "list.csv")]
    for name in (*inside, "", "99", "/etc/passwd", "../../etc/passwd", "..%2f..%2fetc%2fpasswd"):
      assert picture(url, name) == 404
      assert picture(url, name, "upload") == 404
    names = [place / "pictures" / "5.png", place / "list.csv", REPOSITORY / "pyproject.toml",
             pathlib.Path(__file__), pathlib.Path("/etc/passwd")]  # fmt: skip
    for name in names:
      for given in (str(name), f"/{name}", f"../../../../../..{name}", os.path.relpath(name)):
        status, content, _ = request(url, f"/gradio_api/file={urllib.parse.quote(given)}")
        assert status in (403, 404)
        assert content != name.read_bytes()

  def test_no_picture_that_took_the_place_of_an_indexed_one(self, url, place):
    path = place / "pictures" / "6.png"
    before = path.read_bytes()
    path.write_bytes((place / "pictures" / "7.png").read_bytes())
    try:
      assert picture(url, "06") == 404
    finally:
      path.write_bytes(before)
    assert picture(url, "06") == 200

  def test_nothing_that_says_where_files_lie(self, url, place, client):
    found = client.predict(id="05", k=12, api_name="/search")
    for text in (str(found), request(url, "/")[1].decode(), request(url, "/config")[1].decode()):
      assert str(place) not in text
    (place / "pictures" / "8.png").rename(place / "away.png")
    try:
      with pytest.raises(Exception, match="08") as error:
        client.predict(id="08", text="is red", api_name="/search")
      assert str(place) not in str(error.value)
    finally:
      (place / "away.png").rename(place / "pictures" / "8.png")

  def test_the_browser_is_told_to_ask_no_other_host(self, url):
    for path in ("/", "/picture?id=05", "/nothing"):
      headers = request(url, path)[2]
      assert "default-src 'self'" in headers["content-security-policy"]
      assert "http" not in headers["content-security-policy"]
      assert headers["x-content-type-options"] == "nosniff"


class TestLetsIn:
  def test_uploads_up_to_a_size(self, url):
    assert upload(url, bytes(19_000_000))[0] == 200
    assert upload(url, bytes(20_000_001))[0] == 413
    assert upload(url, bytes(30_000_000))[0] == 413

  def test_uploads_up_to_a_size_together(self, url, monkeypatch):
    from crn_jax.catalogue.page import guard

    # What the tests before have left is there.
    monkeypatch.setattr(guard, "MOST_KEPT", 19_000_000)
    assert upload(url, bytes(1_000))[0] == 503
    monkeypatch.setattr(guard, "MOST_KEPT", 200_000_000)
    assert upload(url, bytes(1_000))[0] == 200

  def test_requests_up_to_a_size(self, url):
    for length in (1_000_001, 10**12):
      connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=60)
      connection.putrequest("POST", "/gradio_api/queue/join")
      connection.putheader("Content-Length", str(length))
      connection.endheaders()
      assert connection.getresponse().status == 413
      connection.close()

  def test_requests_whose_size_is_not_said_up_to_a_size(self, url):
    pieces = (b'"' + bytes(100_000) for _ in range(11))
    headers = {"Content-Type": "application/json"}
    status = request(
      url, "/gradio_api/queue/join", "POST", body=pieces, headers=headers, encode_chunked=True
    )[0]
    assert status == 413
    # Of an upload it must be said.
    status = request(url, "/gradio_api/upload", "POST", body=iter([b"x"]), encode_chunked=True)[0]
    assert status == 411

  def test_json_only(self, url):
    headers = {"Content-Type": "application/json"}
    for body in (b"{", b"[" * 100_000, b"\xff"):
      status, _, _ = request(url, "/gradio_api/queue/join", "POST", body=body, headers=headers)
      assert status == 400

  def test_names_of_this_machine_only(self, url, retriever):
    for name in ("localhost", "127.0.0.1:1"):
      assert request(url, "/", headers={"Host": name})[0] == 200
    for name in ("evil.example", "127.0.0.1.evil.example", "evil.example:80"):
      assert request(url, "/", headers={"Host": name})[0] == 400
    with served.page(retriever, "0.0.0.0") as everywhere:
      assert request(everywhere, "/", headers={"Host": "shop.example"})[0] == 200


class TestApi:
  def test_answers_as_in_python(self, client, retriever, place):
    path = place / "pictures" / "5.png"
    found = client.predict(
      image=gradio_client.handle_file(path), text="is red", k=4, api_name="/search"
    )
    hits = retriever.query(str(path), "is red", k=4)
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in hits]
    np.testing.assert_allclose(
      [hit["score"] for hit in found["hits"]], [hit.score for hit in hits], atol=1e-6
    )
    assert found["hits"][0].keys() == {"id", "score", "width", "height", "metadata"}
    assert found["unknown_words"] == []

  def test_filters_floor_and_unknown_words(self, client, retriever):
    where = {"kind": ["dress", "shirt"], "price": {"least": 4}}
    found = client.predict(text="is zebra", where=where, k=100, api_name="/search")
    hits = retriever.query(text="is zebra", k=100, filter='kind in ["dress", "shirt"] and price>=4')
    assert [hit["id"] for hit in found["hits"]] == [hit.id for hit in hits]
    assert found["unknown_words"] == ["zebra"]
    floor = hits[2].score - 1e-6
    found = client.predict(text="is zebra", where=where, min_score=floor, api_name="/search")
    assert len(found["hits"]) == 3

  @pytest.mark.parametrize(
    ("given", "message"),
    [
      ({}, "give a picture, a text, or both"),
      ({"text": "x", "k": 0}, "k: expected 1 to 100"),
      ({"text": "x", "k": 101}, "k: expected 1 to 100"),
      ({"id": "nobody"}, "nobody"),
      ({"text": "x" * 1_001}, "at most 1,000"),
      ({"text": "x", "where": {"brand": ["y"]}}, "no field 'brand'"),
      ({"text": "x", "where": "kind == 1"}, "filters: expected an object"),
    ],
  )
  def test_what_is_wrong_is_a_sentence(self, client, given, message):
    with pytest.raises(gradio_client.exceptions.AppError, match=re.escape(message)):
      client.predict(**given, api_name="/search")

  def test_a_picture_that_is_none(self, client, tmp_path):
    def chunk(name, data):
      return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b""))
    for content, message in ((bomb, "too large"), (b"x", "not a picture of these formats")):
      (tmp_path / "a.png").write_bytes(content)
      image = gradio_client.handle_file(tmp_path / "a.png")
      with pytest.raises(gradio_client.exceptions.AppError, match=message):
        client.predict(image=image, api_name="/search")

  def test_no_file_of_the_server_and_no_address_is_read(self, url, place):
    (uploaded,) = json.loads(upload(url, (place / "pictures" / "5.png").read_bytes())[1])
    assert "event: complete" in ask(url, file_of(uploaded))
    inside = pathlib.Path(uploaded).parents[1]
    (inside / "link.png").symlink_to(place / "pictures" / "5.png")
    for path in (place / "pictures" / "5.png", "/etc/passwd", f"{url}/picture?id=05",
                 "ftp://127.0.0.1/a.png", "file:///etc/passwd", inside, inside / "link.png",
                 inside / ".." / "..", f"{uploaded}\0", f"{inside}x/5.png"):  # fmt: skip
      for image in (file_of(path), file_of(path) | {"url": str(path)}):
        # The same wherever it is said: Gradio looks for files in values of every kind.
        for given in ({"image": image}, {"text": "is red", "where": {"kind": [{"a": image}]}}):
          answer = ask(url, **given)
          assert "event: error" in answer
          assert "A file must be uploaded first" in answer

  def test_one_bad_request_spoils_no_other(self, url, client, retriever):
    (function,) = [f for f in client.endpoints.values() if f.api_name == "/search"]

    def bad(number: int) -> int:
      body = f'{{"data": [], "fn_index": {function.fn_index}, "session_hash": "{number}"}}'
      headers = {"Content-Type": "application/json"}
      return request(url, "/gradio_api/queue/join", "POST", body=body, headers=headers)[0]

    expected = [hit.id for hit in retriever.query(text="is red", k=3)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      spoilers = [pool.submit(bad, i) for i in range(20)]
      good = [pool.submit(client.predict, text="is red", k=3, api_name="/search")
              for _ in range(20)]  # fmt: skip
      for future in good:
        assert [hit["id"] for hit in future.result(60)["hits"]] == expected
      assert all(future.result(60) < 500 for future in spoilers)

  def test_the_example_of_the_docs(self, url, place, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(from gradio_client.*?)```", DOCS, re.DOTALL)
    shutil.copy(place / "pictures" / "5.png", tmp_path / "dress.jpg")
    monkeypatch.chdir(tmp_path)
    assert "http://127.0.0.1:7860" in code
    exec(compile(code.replace("http://127.0.0.1:7860", url), "docs", "exec"), {})
    assert len(re.findall(r"^-?\d\.\d{3} \S+", capsys.readouterr().out, re.MULTILINE)) >= 1


class TestListening:
  def test_a_port_that_is_taken_is_said(self):
    from crn_jax.catalogue.page import server

    with socket.create_server(("127.0.0.1", 0)) as taken:
      port = taken.getsockname()[1]
      with (
        pytest.raises(UserError, match=f"--port={port}: cannot listen there"),
        server.listening("127.0.0.1", port),
      ):
        pass

  @pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("127.0.0.1", 99_999)])
  def test_what_cannot_be_listened_at_is_said(self, host, port):
    from crn_jax.catalogue.page import server

    with pytest.raises(UserError, match="cannot listen there"), server.listening(host, port):
      pass


class TestCommand:
  def start(self, place, *options: str, **environment: str) -> subprocess.Popen:
    environment = os.environ | {
      "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    } | environment  # fmt: skip
    return subprocess.Popen(
      [sys.executable, str(REPOSITORY / "main.py"), "--mode=serve", *options], cwd=place,
      env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

  @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
  def test_serves_until_it_is_ended(self, place, tmp_path, number):
    process = self.start(
      place, "--index=b.db", "--port=0", "--host=0.0.0.0", "--batch_size=1", TMPDIR=str(tmp_path)
    )
    line = process.stdout.readline()
    port = re.search(r"^12 pictures: open http://0\.0\.0\.0:(\d+) ", line)[1]
    # Who lets others in is told what that means.
    assert "everybody who reaches this machine" in process.stdout.readline()
    assert picture(f"http://127.0.0.1:{port}", "05") == 200
    assert list(tmp_path.glob("crn_jax_page_*"))
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert out.endswith("ended\n")
    assert "Traceback" not in error
    assert not list(tmp_path.glob("crn_jax_page_*"))  # Uploads are gone.

  def test_says_what_is_missing(self, place, tmp_path):
    process = self.start(place)
    _, error = process.communicate(timeout=60)
    assert error.strip() == "error: --mode=serve needs --index, e.g. --index=catalogue.db"
    # A finder that finds no Gradio.
    (tmp_path / "sitecustomize.py").write_text(
      "import importlib.util as u\nf = u.find_spec\n"
      "u.find_spec = lambda name, *a: None if name == 'gradio' else f(name, *a)\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    process = self.start(place, "--index=b.db", PYTHONPATH=paths)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--mode=serve needs Gradio, which is not installed: pip install" in error
    assert "Traceback" not in error
