"""Who may import whom (docs/architecture.md), and what printing results must not start."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import crn_jax
from tests import made_up

PACKAGE = pathlib.Path(crn_jax.__file__).parent

# Folder or module of the package -> what it may import of the package, besides itself and `errors`.
ALLOWED = {
  "errors": set(),
  "compilation_cache": set(),
  "xla": set(),
  "background": set(),
  "cluster": {"background"},
  "cards": set(),
  "platforms": set(),
  "models": {"platforms"},
  "parallel": {"background"},
  "processes": {"input_pipeline.dataset", "parallel", "workdir.run"},
  "workdir": {"parallel", "models.backbones.stacking"},
  "methods": {"models"},
  "input_pipeline": {"workdir.files"},
  "threefry": set(),
  "initial_values": {"threefry"},
  "pretrained": {"input_pipeline.tokenizers", "methods", "models", "workdir.weights"},
  "state": {"initial_values", "methods", "models", "workdir.checkpoint", "workdir.weights"},
  "training_step": {"methods", "parallel"},
  "plan": {"cards", "methods", "platforms", "parallel", "stages", "state", "training_step"},
  "stages": {"methods", "workdir.run"},
  "retrieval": {"methods", "parallel", "processes", "input_pipeline", "workdir.files"},
  "reports": {"input_pipeline", "retrieval.metrics", "workdir.history", "workdir.run",
              "workdir.files"},
  "configuration": {"input_pipeline", "methods", "models", "retrieval.metrics", "workdir.run"},
  "command_line": {"configuration", "workdir"},
  "evaluate": {"input_pipeline", "processes", "reports", "retrieval"},
  "catalogue": {"compilation_cache", "feature_training", "input_pipeline", "methods", "pretrained",
                "reports", "retrieval", "state", "workdir"},
  "feature_training": {"input_pipeline", "methods", "parallel", "processes", "retrieval", "stages",
                       "state", "workdir"},
  "train": {"configuration", "evaluate", "feature_training", "input_pipeline", "methods",
            "parallel", "pretrained", "processes", "reports", "retrieval", "stages", "state",
            "training_step", "workdir"},
  "submit": {"configuration", "feature_training", "input_pipeline", "methods", "parallel",
             "pretrained", "processes", "retrieval", "state", "workdir"},
  "convert": {"input_pipeline.tokenizers", "methods", "models", "state", "workdir"},
}  # fmt: skip


def name_of(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = sorted(
  path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"
)  # fmt: skip


def imported(path: pathlib.Path) -> set[str]:
  """Modules and names of the package that a file imports, without the package's own name."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "crn_jax":
      inside = node.module.removeprefix("crn_jax").removeprefix(".")
      names = [alias.name for alias in node.names]
      found |= {f"{inside}.{name}" if inside else name for name in names}
    elif isinstance(node, ast.Import):
      found |= {
        a.name.removeprefix("crn_jax.") for a in node.names if a.name.startswith("crn_jax.")
      }
  return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_follow_the_arrows(path):
  own = name_of(path).partition(".")[0]
  assert own in ALLOWED, f"{own} is new: say in ALLOWED and docs/architecture.md what it may import"
  for name in imported(path):
    inside = name.partition(".")[0] == own or name.partition(".")[0] == "errors"
    allowed = any(name == other or name.startswith(other + ".") for other in ALLOWED[own])
    assert inside or allowed, f"{name_of(path)} imports {name}"


def test_the_arrows_have_no_circle():
  order, waiting = [], {k: {name.partition(".")[0] for name in v} for k, v in ALLOWED.items()}
  while waiting:
    ready = [k for k, needs in waiting.items() if not needs - set(order)]
    assert ready, f"these import each other: {sorted(waiting)}"
    order += ready
    waiting = {k: v for k, v in waiting.items() if k not in ready}


PRINT = """
import json, sys
from crn_jax.reports import tables
from crn_jax.reports.results import Results
print(tables.results_as_text(Results.from_json(json.load(open(sys.argv[1])))))
started = {"jax", "jaxlib", "flax", "tensorflow", "tensorflow_datasets"} & set(sys.modules)
sys.exit(f"started {started}" if started else 0)
"""


def test_printing_results_starts_neither_jax_nor_tensorflow(tmp_path):
  data = made_up.dataset(made_up.split(tmp_path))
  results = made_up.evaluation(made_up.config(), data).results
  path = tmp_path / "eval.json"
  path.write_text(json.dumps(results.to_json()))
  done = subprocess.run(
    [sys.executable, "-c", PRINT, str(path)], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert "val_split, gallery 25" in done.stdout


START = """
import sys
import main
from crn_jax import train
started = {"tensorflow", "matplotlib"} & set(sys.modules)
sys.exit(f"started {started}" if started else 0)
"""


def test_a_training_imports_late_what_its_first_program_does_not_need():
  done = subprocess.run(
    [sys.executable, "-c", START], capture_output=True, text=True, check=False, cwd=PACKAGE.parent
  )
  assert done.returncode == 0, done.stderr
