"""--mode=submit: the files that a data set's server takes, from a run.

What a server takes is said by the data set (`dataset.SubmissionSpec`). Every file is checked as the
server will read it before any is written.
"""

import json
import os
import pathlib
import reprlib
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from crn_jax import configuration, feature_training, pretrained, processes, state
from crn_jax.errors import UserError
from crn_jax.input_pipeline.dataset import EvalSplit, SubmissionFile, SubmissionSpec
from crn_jax.input_pipeline.registry import DATASETS
from crn_jax.input_pipeline.tokenizers import base as tokenizers
from crn_jax.methods import registry
from crn_jax.parallel import AXIS, DataParallel, is_primary
from crn_jax.retrieval import ranking
from crn_jax.retrieval.encode import Encoder
from crn_jax.workdir import files, run

_MAX_LISTED = 10


def submit(config: ml_collections.ConfigDict, workdir: str | os.PathLike, which: str) -> str:
  """Answers the queries of a data set's server, and writes its files.

  Args:
    config: of the run; the fields in `run.fields_free_to_evaluate` may differ. Or of a method that
      is not trained.
    workdir: of the run; gets `submission/`. Of a method that is not trained, any other folder.
    which: 'best' or 'last' checkpoint.

  Returns:
    What was written and where it is sent, for people to read; '' in other processes than the
    primary one, which writes.

  Raises:
    UserError: the data set has no server, its data are not complete, `workdir` holds no trained
      run, or the configuration is not the run's.
  """
  workdir = pathlib.Path(workdir)
  processes.check_shared(workdir)
  configuration.check(config, eval_devices=jax.device_count())
  processes.check_alike(config)
  spec = _spec(config)  # Before anything is read.
  parallel = DataParallel.create(config.parallel.mode)
  trains = registry.METHODS[config.method].trains
  if trains:
    run.check_trained(workdir)
    run.check_config(config, workdir, free=run.fields_free_to_evaluate(config, workdir))
    tokenizer = tokenizers.load(workdir / "vocab.json")
  else:
    run.check_folder(workdir)
    tokenizer = pretrained.new_tokenizer(config, captions=())
    state.check_pretrained(config)
  dataset = processes.primary_first(lambda _: spec.read(config.data), lambda _: "checked")
  processes.check_same_queries(dataset.evals)
  method = registry.create(config, len(tokenizer), AXIS)
  if trains:
    encoder = feature_training.encoder_of_run(method, parallel, dataset, tokenizer, workdir)
    # A training may write another one meanwhile.
    step = processes.on_primary(lambda: state.chosen_step(workdir, which))
    variables = state.trained(method, workdir, step)
    answered_by = f"the {which} checkpoint (step {step})"
  else:
    encoder = Encoder.create(method, parallel)
    variables = state.initial_variables(method, config.model.pretrained)
    answered_by = f"{config.model.pretrained}, without any training"
  (split,) = dataset.evals
  encoded = encoder.encode(parallel.replicate(variables), split, tokenizer)
  added = encoded.added.get("composed")
  added = added and added(np.arange(len(split.queries)))
  contents = answers(split, encoded.composed, encoded.images, spec.files, added)

  def written():
    paths = write(contents, split, workdir / "submission")
    return "\n".join(
      [
        f"{config.data.dataset}: {len(split.queries):,} queries answered by {answered_by}",
        "written:",
        *(f"  {path}" for path in paths),
        f"send them to {spec.server}",
      ]
    )

  text = processes.on_primary(written)
  return text if is_primary() else ""


def answers(
  split: EvalSplit,
  queries: np.ndarray,
  images: np.ndarray,
  asked: Sequence[SubmissionFile],
  added: np.ndarray | None = None,
) -> list[tuple[SubmissionFile, dict]]:
  """The files that are asked for, each with its content.

  Args:
    split: the server's queries, of one gallery.
    queries: [queries, d] vectors.
    images: [images, d] vectors.
    asked: the files.
    added: [queries, images] what is added to the products of vectors; None adds nothing.
  """
  ((protocol, rows),) = split.galleries.items()
  contents = []
  for file in asked:
    if file.within_subset:
      best = ranking.subset_order(queries, images, split.subsets, added)[:, : file.count]
    else:
      exclude = np.full(len(queries), -1)
      if split.excludes_reference(protocol, otherwise=False):
        exclude = split.reference_positions(protocol)
      positions, _ = ranking.top_k(
        queries,
        images[rows],
        file.count,
        exclude,
        added=None if added is None else added[:, rows],
      )
      best = rows[positions]
    convert = int if file.integers else str
    names = [[convert(split.image_ids[row]) for row in ranked if row >= 0] for ranked in best]
    content = dict(file.header) | dict(zip(split.query_ids, names, strict=True))
    contents.append((file, content))
  return contents


def write(
  contents: Sequence[tuple[SubmissionFile, dict]], split: EvalSplit, folder: pathlib.Path
) -> list[pathlib.Path]:
  """Checks all files, then writes them; each appears complete or not at all.

  Returns:
    Their paths.

  Raises:
    UserError: a server would refuse one of them; nothing is written.
  """
  for file, content in contents:
    if wrong := problems(content, file, split):
      more = f"\n  ... and {len(wrong) - _MAX_LISTED:,} more" if len(wrong) > _MAX_LISTED else ""
      raise UserError(
        f"{file.name}: the server would refuse this, so nothing is written:\n  "
        + "\n  ".join(wrong[:_MAX_LISTED])
        + more
      )
  folder.mkdir(parents=True, exist_ok=True)
  for file, content in contents:
    with files.replacing(folder / file.name) as partial:
      partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
  return [folder / file.name for file, _ in contents]


def problems(content: object, file: SubmissionFile, split: EvalSplit) -> list[str]:
  """What a server would refuse in a file's content, in sentences; empty if nothing.

  Args:
    content: as parsed from JSON.
    file: what the file shall be.
    split: the server's queries.
  """
  if not isinstance(content, dict):
    return [f"expected an object, found {reprlib.repr(content)}"]
  ((protocol, rows),) = split.galleries.items()
  gallery = frozenset(split.image_ids[row] for row in rows)
  excluded = split.excludes_reference(protocol, otherwise=False)
  found = [
    f"{key}: expected {value!r}, found {content.get(key)!r}"
    for key, value in file.header.items()
    if content.get(key) != value
  ]
  known = frozenset((*file.header, *split.query_ids))
  found += [f"{key}: no query has this id" for key in content if key not in known]
  for q, query in enumerate(split.query_ids):
    if query not in content:
      found.append(f"query {query}: has no answer")
      continue
    allowed = gallery
    if file.within_subset:
      allowed = frozenset(split.image_ids[row] for row in split.subsets[q] if row >= 0)
    if excluded:
      allowed -= {split.image_ids[split.queries.reference[q]]}
    if wrong := _wrong_answer(content[query], file, allowed):
      found.append(f"query {query}: {wrong}")
  return found


def _wrong_answer(answer: object, file: SubmissionFile, allowed: frozenset[str]) -> str | None:
  kind = int if file.integers else str
  if not isinstance(answer, list) or any(type(name) is not kind for name in answer):
    return f"expected a list of {kind.__name__}, found {reprlib.repr(answer)}"
  if len(answer) != file.count:
    return f"expected {file.count} images, found {len(answer)}"
  if len(set(answer)) < len(answer):
    twice = next(name for i, name in enumerate(answer) if name in answer[:i])
    return f"names {twice} twice"
  if strange := [name for name in answer if str(name) not in allowed]:
    return f"{strange[0]} is none of the {len(allowed)} images that are ranked"
  return None


def _spec(config: ml_collections.ConfigDict) -> SubmissionSpec:
  spec = DATASETS[config.data.dataset].submission
  if spec is None:
    known = [name for name, other in DATASETS.items() if other.submission]
    raise UserError(
      f"data.dataset = {config.data.dataset!r} has no server to submit to; {', '.join(known)} have"
    )
  return spec
