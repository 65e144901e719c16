"""JAX's persistent compilation cache: a program is compiled once, not at every start.

The folder is the user's own, because whoever can write to it can have this process run anything.
"""

import os
import pathlib
import stat

import jax
from absl import logging

# What compiles faster than this many seconds is not worth a file. JAX's own second would leave out
# the programs that draw initial values: many, and each of a fraction of a second.
_MIN_SECONDS = 0.05


def enable(folder: str | None = None) -> pathlib.Path | None:
  """Turns the cache on; to be called before anything is compiled.

  Args:
    folder: where compiled programs are kept; 'none' keeps none. None is what JAX is configured
      with (JAX_COMPILATION_CACHE_DIR), or else a folder of this version of JAX in the user's cache
      folder ($XDG_CACHE_HOME or ~/.cache).

  Returns:
    The folder, or None without a cache: if it was asked for, or, with a warning, if the folder
    cannot be made, belongs to another user or is writable by everybody.
  """
  if folder == "none":
    jax.config.update("jax_enable_compilation_cache", False)
    return None
  if folder is None and jax.config.jax_compilation_cache_dir:
    return pathlib.Path(jax.config.jax_compilation_cache_dir)
  path = _default() if folder is None else pathlib.Path(folder).expanduser().absolute()
  refused = _refused(path)
  if refused:
    logging.warning(
      "%s; nothing compiled is kept. Choose another folder with --compilation_cache=DIR, or say "
      "--compilation_cache=none",
      refused,
    )
    jax.config.update("jax_enable_compilation_cache", False)
    return None
  jax.config.update("jax_compilation_cache_dir", str(path))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
  return path


def _default() -> pathlib.Path:
  base = os.environ.get("XDG_CACHE_HOME", "")
  # As its specification asks, a relative path is ignored.
  caches = pathlib.Path(base) if os.path.isabs(base) else pathlib.Path.home() / ".cache"
  return caches / "crn_jax" / f"jax-{jax.__version__}"


def _refused(path: pathlib.Path) -> str | None:
  """Makes the folder; why what is found in it cannot be trusted, or None."""
  try:
    missing = [p for p in (path, *path.parents) if not p.exists()]
    for folder in reversed(missing):
      folder.mkdir(mode=0o700, exist_ok=True)  # Not `parents=True`, which gives them another mode.
    found = path.stat()
  except OSError as error:
    return f"{path}: the folder for compiled programs cannot be made ({error})"
  if not stat.S_ISDIR(found.st_mode):
    return f"{path}: no folder"
  if found.st_uid != os.geteuid():
    return f"{path}: belongs to another user, whose programs would be run"
  if found.st_mode & stat.S_IWOTH:
    return f"{path}: everybody can write to it, and their programs would be run"
  return None
