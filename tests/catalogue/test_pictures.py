"""Which files are pictures of a catalogue, and what is read of them."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from crn_jax.catalogue import pictures
from tests.catalogue import made


def encoded(image: Image.Image, kind: str, **options) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


class TestWalk:
  def test_ids_are_paths_from_the_folder_in_order(self, tmp_path):
    for name in ("b.png", "a/c.PNG", "a/b.png", "a/.hidden.png", ".thumbnails/x.png"):
      made.picture(tmp_path / name, 0)
    (tmp_path / "notes.txt").write_text("no picture")
    found, skipped = pictures.walk(tmp_path)
    assert [source.id for source in found] == ["a/b.png", "a/c.PNG", "b.png"]
    assert [source.path for source in found] == [str(tmp_path / s.id) for s in found]
    assert not skipped

  def test_a_name_that_is_no_utf8_is_skipped(self, tmp_path):
    made.picture(tmp_path / "a.png", 0).rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    found, (skipped,) = pictures.walk(tmp_path)
    assert not found
    assert (skipped.path, skipped.reason) == (
      f"{tmp_path}/?.png", "the id is no UTF-8; rename the file",
    )  # fmt: skip

  def test_links_to_files_are_followed_and_to_folders_not(self, tmp_path):
    made.picture(tmp_path / "elsewhere" / "a.png", 0)
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (root / "loop").symlink_to(root)
    assert [source.id for source in pictures.walk(root)[0]] == ["link.png"]

  def test_a_folder_that_cannot_be_listed_is_an_error(self, tmp_path, monkeypatch):
    """Its pictures must not be taken for removed ones."""

    def scandir(path):
      raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
      pictures.walk(tmp_path)


class TestReadFile:
  def test_what_is_no_file_is_not_waited_for(self, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, reason in (
      (tmp_path / "pipe.png", "no ordinary file"),
      (tmp_path, "no ordinary file"),
      (tmp_path / "absent.png", "no such file"),
    ):
      with pytest.raises(pictures.Unreadable, match=reason):
        pictures.read_file(path)

  def test_bytes_are_bounded(self, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 1_000_001)
    assert len(pictures.read_file(tmp_path / "a", 1_000_001)) == 1_000_001
    with pytest.raises(pictures.Unreadable, match="larger than 1 MB"):
      pictures.read_file(tmp_path / "a", 1_000_000)


class TestDecode:
  @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
  def test_formats(self, kind):
    image = Image.new("RGB", (30, 20), "red")
    pixels = pictures.decode(encoded(image, kind))
    assert (pixels.shape, pixels.dtype) == ((20, 30, 3), np.uint8)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 4

  @pytest.mark.parametrize("orientation", range(1, 9))
  def test_pictures_are_upright(self, orientation):
    """As viewers and browsers show them, whatever way the camera was held."""
    upright = np.zeros((20, 40, 3), np.uint8)
    upright[:10, :20] = 255
    turn = {
      1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
      4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
      6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    image = Image.fromarray(upright)
    stored = image if turn is None else image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(pictures.decode(encoded(stored, "PNG", exif=exif)), upright)

  def test_other_formats_are_not_tried(self):
    for kind in ("TIFF", "PPM", "ICO", "EPS"):
      with pytest.raises(pictures.Unreadable, match="not a picture of these formats: JPEG, PNG"):
        pictures.decode(encoded(Image.new("RGB", (16, 16)), kind))

  def test_a_decompression_bomb_is_refused_before_it_is_decoded(self):
    def chunk(name, data):
      return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    for side in (10_000, 100_000):  # Below and above what Pillow itself refuses.
      head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
      bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b""))
      with pytest.raises(pictures.Unreadable, match="too large"):
        pictures.decode(bomb)

  @pytest.mark.parametrize(
    ("content", "reason"),
    [
      (b"", "empty"),
      (b"<html>not found</html>", "not a picture of these formats"),
      (encoded(Image.effect_noise((64, 64), 50), "PNG")[:500], "truncated"),
      (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:500], "truncated"),
      (b"\0\0\0\x18ftypavifmif1", "AVIF"),
      (encoded(Image.new("L", (1, 500)), "PNG"), "too elongated"),
    ],
  )
  def test_what_is_wrong_is_said(self, content, reason):
    with pytest.raises(pictures.Unreadable, match=reason):
      pictures.decode(content)


def test_names_are_printed_in_one_line_that_commands_no_terminal():
  assert pictures.printable("a\n\x1b[31mb\udcffé") == "a??[31mb?é"
