"""The training loop: data, update, logs, checkpoints, evaluation."""

import contextlib
import math
import os
import pathlib

import jax
import ml_collections
import tqdm
from clu import metric_writers

from crn_jax import checkpoint, evaluate, optimizer, report, run, weights
from crn_jax.encode import Encoder
from crn_jax.input_pipeline import loader
from crn_jax.input_pipeline.datasets import open_dataset
from crn_jax.input_pipeline.vocabulary import Vocabulary
from crn_jax.models import crn
from crn_jax.parallel import AXIS, REPLICATED, DataParallel
from crn_jax.train_step import TrainState, make_train_step


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> str:
  """Trains in `workdir`, continuing from its last checkpoint if there is one, and evaluates.

  Args:
    config: see `configs/default.py`.
    workdir: gets config.json, vocab.json, checkpoints/, TensorBoard events, eval.json, pictures/.

  Returns:
    The results of the final parameters and the paths written, for people to read.

  Raises:
    ValueError, FileNotFoundError: on a bad configuration or bad data, before the first step.
    FloatingPointError: if a loss is not finite.
  """
  workdir = pathlib.Path(workdir)
  parallel = DataParallel.create(config.parallel.mode)
  parallel.check_batch_size(config.batch_size, "batch_size")
  run.check_config(config, workdir)
  dataset = open_dataset(config.data, train=True)
  vocabulary = Vocabulary.build(
    dataset.train.captions, markers=config.data.markers, max_words=config.data.max_words
  )
  steps_per_epoch = loader.steps_per_epoch(len(dataset.train.triplets), config.batch_size)
  total_steps = steps_per_epoch * config.num_epochs
  model = crn.build(config.model, len(vocabulary), AXIS)
  tx = optimizer.create(config, steps_per_epoch, total_steps)
  encoder = Encoder.create(model, config, parallel)
  state = TrainState.create(weights.initial_variables(model, config), tx)
  print(
    f"{dataset.name}: {len(dataset.train.triplets)} triplets of {len(dataset.train.image_paths)} "
    f"images, {len(vocabulary)} words\n"
    f"{config.preset}: {sum(x.size for x in jax.tree.leaves(state.params)):,} parameters; "
    f"{config.num_epochs} epochs of {steps_per_epoch} steps; "
    f"{parallel.mode} on {len(parallel.devices)} x {parallel.devices[0].device_kind}\n"
    f"work directory {workdir}"
  )
  workdir.mkdir(parents=True, exist_ok=True)
  run.save_config(config, workdir)
  vocabulary.save(workdir / "vocab.json")
  train_step = parallel.map(
    make_train_step(model, tx, config, AXIS), (REPLICATED, REPLICATED), donate_first=True
  )
  schedule = optimizer.learning_rate(config.optimizer, steps_per_epoch, total_steps)
  evaluation = None
  with (
    checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints,
    contextlib.closing(metric_writers.SummaryWriter(str(workdir))) as writer,
  ):
    if (last := checkpoints.last_step()) is not None:
      print(f"continuing from the checkpoint at step {last}")
      state = checkpoints.restore(last, state)
    start = int(state.step)
    state = parallel.replicate(state)
    batches = _train_batches(config, dataset, vocabulary, parallel, start, total_steps)
    with tqdm.tqdm(initial=start, total=total_steps, desc="train", unit="step") as progress:
      for step in range(start + 1, total_steps + 1):
        state, metrics = train_step(state, next(batches))
        progress.update()
        if step % config.log_every_steps == 0 or step == total_steps:
          values = {k: float(v) for k, v in parallel.fetch(metrics).items()}
          check_finite(values, step)
          values["learning_rate"] = float(schedule(step - 1))
          writer.write_scalars(step, {f"train/{k}": v for k, v in values.items()})
          progress.set_postfix({k: f"{values[f'{k}/total']:.3f}" for k in crn.BRANCHES})
        if step % (steps_per_epoch * config.eval.every_epochs) == 0 or step == total_steps:
          evaluation = _evaluate(encoder, state, dataset, vocabulary, step)
          metric = evaluate.best_metric(evaluation.results)
          checkpoints.save(parallel.fetch(state), metric)
          writer.write_scalars(step, recall_scalars(evaluation.results))
          progress.write(f"step {step}: {config.eval.best_metric} = {metric:.2f} %")
  if evaluation is None:  # The run was complete already.
    evaluation = _evaluate(encoder, state, dataset, vocabulary, start)
  return _conclude(encoder, state, vocabulary, workdir, dataset, evaluation)


def evaluate_run(config: ml_collections.ConfigDict, workdir: str | os.PathLike, which: str) -> str:
  """Evaluates a trained run; nothing is rebuilt from the training data.

  Args:
    config: of the run; the fields in `run.FREE_FIELDS` and the `eval` part may differ.
    workdir: of the run.
    which: 'best' or 'last' checkpoint.

  Returns:
    The results and the paths written, for people to read.

  Raises:
    FileNotFoundError: if `workdir` holds no trained run.
    ValueError: if the configuration is not the run's.
  """
  workdir = pathlib.Path(workdir)
  for name in ("config.json", "vocab.json", "checkpoints"):
    if not (workdir / name).exists():
      raise FileNotFoundError(
        f"{workdir / name}: not found, so {workdir} holds no trained run. Name the folder of a run "
        f"with --workdir, or train one with --mode=train"
      )
  run.check_config(config, workdir, free=(*run.FREE_FIELDS, "eval"))
  parallel = DataParallel.create(config.parallel.mode)
  vocabulary = Vocabulary.load(workdir / "vocab.json")
  dataset = open_dataset(config.data, train=False)
  model = crn.build(config.model, len(vocabulary), AXIS)
  encoder = Encoder.create(model, config, parallel)

  def like():
    variables = model.init(jax.random.key(0), config.data.image_size, config.data.max_words)
    return TrainState.create(variables, optimizer.create(config, 1, 1))

  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    step = checkpoints.best_step() if which == "best" else checkpoints.last_step()
    if step is None:
      raise FileNotFoundError(
        f"{workdir / 'checkpoints'}: holds no checkpoint; the first is written after the first "
        f"evaluation of the training"
      )
    state = checkpoints.restore(step, jax.eval_shape(like))
  state = parallel.replicate(state)
  evaluation = _evaluate(encoder, state, dataset, vocabulary, step, which)
  return _conclude(encoder, state, vocabulary, workdir, dataset, evaluation)


def check_finite(metrics: dict[str, float], step: int) -> None:
  """Raises FloatingPointError naming the terms that are not finite."""
  bad = [name for name, value in metrics.items() if not math.isfinite(value)]
  if bad:
    raise FloatingPointError(
      f"step {step}: {', '.join(bad)} not finite; the last checkpoint is kept. A lower "
      f"optimizer.learning_rate or optimizer.clip_norm = 1.0 often helps"
    )


def recall_scalars(results: dict) -> dict[str, float]:
  """Recalls as TensorBoard scalars, e.g. 'eval/val_split/R@10'."""
  return {
    f"eval/{protocol}/{metric}": value
    for protocol, recalls in results["protocols"].items()
    for metric, value in recalls.items()
    if metric.startswith("R@")
  }


def _train_batches(config, dataset, vocabulary, parallel, start: int, total_steps: int):
  """Device batches of steps start .. total_steps - 1."""
  data = config.data
  batches = loader.train_batches(
    dataset.train,
    vocabulary,
    batch_size=config.batch_size,
    image_size=data.image_size,
    resize=data.resize,
    augmentation=data.augment,
    seed=config.seed,
    start_step=start,
    num_steps=total_steps,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    cache_images=data.cache_images,
  )
  return loader.prefetch_to_device(batches, parallel.shard)


def _evaluate(encoder, state, dataset, vocabulary, step: int, which: str = "last"):
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  return evaluate.evaluate(encoder, variables, dataset, vocabulary, step, which)


def _conclude(encoder, state, vocabulary, workdir, dataset, evaluation) -> str:
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  written = report.write(encoder, variables, vocabulary, workdir, dataset, evaluation)
  table = evaluate.format_table(evaluation.results)
  return "\n".join([table, "", "written:", *(f"  {p}" for p in written)])
