"""The cache of compiled programs: a second start compiles nothing, and only own files are run."""

import logging
import os
import subprocess
import sys

import jax
import pytest

from crn_jax import compilation_cache

START = """
import sys
import jax
from crn_jax import compilation_cache

hits, misses = [], []
jax.monitoring.register_event_listener(
  lambda name, **_: {"/jax/compilation_cache/cache_hits": hits,
                     "/jax/compilation_cache/cache_misses": misses}.get(name, []).append(name))
folder = compilation_cache.enable(*sys.argv[1:])
# The autotuning results of GPUs are kept in the same place.
xla = jax.config.jax_persistent_cache_enable_xla_caches
assert xla == "all" or "autotune" in xla, xla

@jax.jit
def slow_to_compile(key):
  return [jax.random.truncated_normal(key, -1, 1, (n, 3)) for n in range(1, 20)]

drawn = slow_to_compile(jax.random.key(0))
print(folder, len(hits), len(misses), sum(float(x.sum()) for x in drawn))
"""


def start(tmp_path, *args, **environment):
  """Folder, programs found in the cache and a number, as a fresh process has them."""
  kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
  done = subprocess.run(
    [sys.executable, "-c", START, *args],
    env={**kept, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "caches"), **environment},
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  folder, hits, misses, drawn = done.stdout.split()
  return folder, int(hits), int(misses), drawn


def test_a_second_start_finds_what_the_first_compiled_and_computes_the_same(tmp_path):
  folder, hits, _, drawn = start(tmp_path)
  assert folder == str(tmp_path / "caches" / "crn_jax" / f"jax-{jax.__version__}")
  assert hits == 0
  for made in (tmp_path / "caches" / "crn_jax", tmp_path / "caches"):
    assert made.stat().st_mode & 0o777 == 0o700
  assert start(tmp_path)[1] > 0
  assert start(tmp_path)[3] == drawn


def test_another_folder_is_used_and_none_is(tmp_path):
  assert start(tmp_path, str(tmp_path / "own"))[:2] == (str(tmp_path / "own"), 0)
  assert list((tmp_path / "own").glob("*slow_to_compile*"))
  assert start(tmp_path, "none", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))[:2] == ("None", 0)
  assert not (tmp_path / "caches").exists()


def test_what_jax_is_configured_with_is_left_alone(tmp_path):
  configured = str(tmp_path / "configured")
  assert start(tmp_path, JAX_COMPILATION_CACHE_DIR=configured)[0] == configured
  assert not (tmp_path / "caches").exists()


@pytest.fixture
def jax_config():
  names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache",
           "jax_persistent_cache_min_compile_time_secs")  # fmt: skip
  before = {name: getattr(jax.config, name) for name in names}
  yield jax.config
  for name, value in before.items():
    jax.config.update(name, value)


def writable_by_all(folder, monkeypatch):
  del monkeypatch
  folder.mkdir()
  folder.chmod(0o777)


def somebody_elses(folder, monkeypatch):
  folder.mkdir()
  monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)


def a_file(folder, monkeypatch):
  del monkeypatch
  folder.touch()


@pytest.mark.parametrize(
  ("prepare", "message"),
  [
    (writable_by_all, "everybody can write"),
    (somebody_elses, "another user"),
    (a_file, "no folder"),
  ],
)
def test_a_folder_that_cannot_be_trusted_is_refused_with_a_warning(
  tmp_path, monkeypatch, caplog, jax_config, prepare, message
):
  folder = tmp_path / "cache"
  prepare(folder, monkeypatch)
  with caplog.at_level(logging.WARNING):
    assert compilation_cache.enable(str(folder)) is None
  assert message in caplog.text
  assert "--compilation_cache=DIR" in caplog.text
  assert jax_config.jax_compilation_cache_dir != str(folder)
  assert not jax_config.jax_enable_compilation_cache


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path, caplog, jax_config):
  (tmp_path / "file").touch()
  assert compilation_cache.enable(str(tmp_path / "file" / "cache")) is None
  assert "cannot be made" in caplog.text
