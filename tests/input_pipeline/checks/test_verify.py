"""Verification of image files: every sort of damage is found, equal files are not decoded again."""

import os

import numpy as np
import pytest
from PIL import Image

from crn_jax.errors import UserError
from crn_jax.input_pipeline import images
from crn_jax.input_pipeline.checks import verify


def damage(path):
  reason, _ = verify.inspect(path)
  return reason


@pytest.fixture
def pixels():
  return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_found(tmp_path, pixels, mode, progressive):
  path = tmp_path / "image.jpg"
  Image.fromarray(pixels).convert(mode).save(path, progressive=progressive)
  assert damage(path) is None
  content = path.read_bytes()
  for kept in (0.3, 0.5, 0.9, 0.99):
    path.write_bytes(content[: int(kept * len(content))])
    assert damage(path) == "truncated", kept
  for cut in range(1, 20):
    path.write_bytes(content[:-cut])
    assert damage(path) == "truncated", cut


def test_a_truncated_png_is_found(tmp_path, pixels):
  path = tmp_path / "image.png"
  Image.fromarray(pixels).save(path)
  assert damage(path) is None
  content = path.read_bytes()
  for kept in (0.1, 0.5, 0.99):
    path.write_bytes(content[: int(kept * len(content))])
    assert damage(path) == "truncated", kept
  content = bytearray(content)
  content[60] ^= 255
  path.write_bytes(content)
  assert damage(path).startswith("damaged: ")


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_what_is_damaged_is_what_cannot_be_decoded(tmp_path, extension):
  """Verification lets nothing through that stops training, and refuses nothing that would not."""
  path = tmp_path / f"image.{extension}"
  Image.fromarray(np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)).save(path)
  content = path.read_bytes()
  for length in range(len(content) + 1):
    path.write_bytes(content[:length])
    try:
      images.decode(path)
      decodes = True
    except UserError:
      decodes = False
    assert (damage(path) is None) == decodes, length


def test_files_that_are_no_images_are_found(tmp_path):
  path = tmp_path / "image.jpg"
  path.write_bytes(b"")
  assert damage(path) == "empty"
  path.write_text("<!DOCTYPE html><html>404 Not Found</html>")
  assert damage(path) == "not an image"
  path.unlink()
  assert damage(path) == "damaged: No such file or directory"


def test_an_image_of_one_pixel_is_fine(tmp_path):
  Image.new("RGB", (1, 1)).save(tmp_path / "image.jpg")
  assert damage(tmp_path / "image.jpg") is None


@pytest.fixture
def paths(tmp_path):
  paths = [str(tmp_path / "data" / f"{i}.jpg") for i in range(5)]
  (tmp_path / "data").mkdir()
  for i, path in enumerate(paths):
    Image.new("RGB", (8, 8), (i, i, i)).save(path)
  return paths


def count_decoded(monkeypatch):
  seen = []
  inspect = verify.inspect
  monkeypatch.setattr(verify, "inspect", lambda path: [seen.append(path), inspect(path)][1])
  return seen


def test_unchanged_files_are_not_decoded_again(paths, monkeypatch):
  root = os.path.dirname(paths[0])
  seen = count_decoded(monkeypatch)
  first = verify.verify(paths, root)
  digest = first.digest
  assert first.unreadable == {} and sorted(seen) == paths
  assert verify.verify(paths, root, digest) == first
  assert len(seen) == 5
  stat = os.stat(paths[0])
  os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
  changed = verify.verify(paths, root, digest).digest
  assert len(seen) == 10 and changed != digest
  fewer = verify.verify(paths[1:], root, changed).digest
  assert len(seen) == 14 and fewer != changed


def test_files_that_passed_other_limits_are_decoded_again(paths, monkeypatch):
  root = os.path.dirname(paths[0])
  digest = verify.verify(paths, root).digest
  seen = count_decoded(monkeypatch)
  monkeypatch.setattr(images, "MAX_ASPECT", 50)
  verify.verify(paths, root, digest)
  assert len(seen) == 5


def test_the_digest_does_not_depend_on_where_the_folder_lies(paths, tmp_path):
  root = tmp_path / "data"
  digest = verify.verify(paths, root).digest
  root.rename(tmp_path / "moved")
  moved = [str(tmp_path / "moved" / os.path.basename(path)) for path in paths]
  assert verify.verify(moved, tmp_path / "moved").digest == digest


def test_while_a_file_is_unreadable_all_are_looked_at_again(paths, monkeypatch):
  root = os.path.dirname(paths[0])
  for i in (3, 1):
    open(paths[i], "wb").close()
  found = verify.verify(paths, root)
  unreadable, digest = found.unreadable, found.digest
  assert unreadable == {paths[1]: "empty", paths[3]: "empty"}
  assert list(unreadable) == [paths[1], paths[3]]
  seen = count_decoded(monkeypatch)
  verify.verify(paths, root, digest)
  assert len(seen) == 5
