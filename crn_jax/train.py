"""The training loop: data, update, logs, checkpoints, evaluation."""

import dataclasses
import os
import pathlib

import jax
import ml_collections

from crn_jax import evaluate
from crn_jax.input_pipeline import loader
from crn_jax.input_pipeline.checks import missing
from crn_jax.input_pipeline.registry import open_dataset
from crn_jax.input_pipeline.tokenizers.words import Vocabulary
from crn_jax.methods import optimizer
from crn_jax.methods.crn import TrainState, make_train_step
from crn_jax.models import crn
from crn_jax.models.backbones import registry
from crn_jax.parallel import AXIS, REPLICATED, DataParallel
from crn_jax.reports import report, tables
from crn_jax.retrieval.encode import Encoder
from crn_jax.workdir import checkpoint, logs, run, weights
from crn_jax.workdir.interrupt import Interrupted, Interruption
from crn_jax.workdir.progress import Progress


def train(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> str:
  """Trains in `workdir`, continuing from its last checkpoint if there is one, and evaluates.

  Args:
    config: see `configs/default.py`.
    workdir: gets what `docs/runs.md` lists.

  Returns:
    The results of the final parameters and the paths written, for people to read.

  Raises:
    ValueError, FileNotFoundError: on a bad configuration or bad data, before the first step.
    FloatingPointError: if a loss is not finite.
    OSError: if the last checkpoint could not be written.
    Interrupted: after SIGINT or SIGTERM, with the state saved.
  """
  workdir = pathlib.Path(workdir)
  parallel = DataParallel.create(config.parallel.mode)
  parallel.check_batch_size(config.batch_size, "batch_size")
  registry.create(config.model.backbone)  # Before data are read, for its errors.
  run.check_config(config, workdir, run.free_fields(config))
  resumes = checkpoint.exists(workdir / "checkpoints")
  if not resumes:
    weights.check_pretrained(config)
  dataset = open_dataset(config.data, train=True, known_digest=run.known_digest(workdir))
  run.check_data(dataset, workdir)
  if resumes:  # A converted model has other words than the data.
    vocabulary = Vocabulary.load(workdir / "vocab.json")
  else:
    vocabulary = Vocabulary.build(
      dataset.train.captions, markers=config.data.markers, max_words=config.data.max_words
    )
  plan = Plan.create(config, len(dataset.train.triplets))
  model = crn.build(config.model, len(vocabulary), AXIS)
  tx = optimizer.create(config, plan.steps_per_epoch, plan.total_steps)
  encoder = Encoder.create(model, config, parallel)
  averaged = config.optimizer.ema_decay > 0
  variables = weights.initial_variables(model, config, pretrained=not resumes)
  state = TrainState.create(variables, tx, averaged=averaged)
  print(
    f"{dataset.name}: {len(dataset.train.triplets)} triplets of {len(dataset.train.image_paths)} "
    f"images, {len(vocabulary)} words\n"
    f"{config.preset}: {sum(x.size for x in jax.tree.leaves(state.params)):,} parameters; "
    f"{config.num_epochs} epochs of {plan.steps_per_epoch} steps; "
    f"{parallel.mode} on {len(parallel.devices)} x {parallel.devices[0].device_kind}\n"
    f"work directory {workdir}\n"
    f"initial values: {_origin(config, workdir, resumes)}"
  )
  if dataset.skipped:
    print(missing.describe_skipped(dataset.skipped))
  workdir.mkdir(parents=True, exist_ok=True)
  run.save_config(config, workdir)
  run.save_data(dataset, workdir)
  vocabulary.save(workdir / "vocab.json")
  train_step = parallel.map(
    make_train_step(model, tx, config, AXIS), (REPLICATED, REPLICATED), donate_first=True
  )

  def evaluate_state(state, step):
    return _evaluate(encoder, state, dataset, vocabulary, step, "last")

  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    if (restored := checkpoints.restore_last(state)) is not None:
      state = restored
      print(f"continuing from the checkpoint at step {int(state.step)}")
    checkpoints.check_space(state)
    start = int(state.step)
    state = parallel.replicate(state)
    if start == plan.total_steps:  # The run was complete already.
      evaluation = evaluate_state(state, start)
    else:
      batches = _train_batches(config, dataset, vocabulary, parallel, start, plan.total_steps)
      state, evaluation = _run_steps(
        config, plan, workdir, state, start, batches, train_step, evaluate_state, checkpoints,
        parallel,
      )  # fmt: skip
    checkpoints.require(plan.total_steps)
    best = checkpoints.best_step()
    if best == plan.total_steps:
      evaluation.results["also"] = "best"
    elif best is not None:
      evaluation.results["beside"] = [checkpoints.results(best) | {"selection": "best"}]
  shown = _conclude(encoder, state, vocabulary, workdir, dataset, evaluation)
  with logs.Log(workdir, plan.total_steps) as log:
    log.pictures(plan.total_steps, sorted((workdir / "pictures").glob("*.png")))
  return shown


def _origin(config: ml_collections.ConfigDict, workdir: pathlib.Path, resumes: bool) -> str:
  """Where the parameters come from; the order is that of docs/weights.md."""
  if resumes:
    return f"the last checkpoint in {workdir / 'checkpoints'}"
  if config.model.pretrained:
    return f"both backbones from {config.model.pretrained} (model.pretrained), the rest random"
  return "random"


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is due at which step; steps count from 1, as updates done."""

  steps_per_epoch: int
  total_steps: int
  evaluate_every: int
  save_every: int
  log_every: int

  @classmethod
  def create(cls, config: ml_collections.ConfigDict, n_triplets: int) -> "Plan":
    """From the whole configuration and the number of training triplets."""
    per_epoch = loader.steps_per_epoch(n_triplets, config.batch_size)
    return cls(
      per_epoch,
      per_epoch * config.num_epochs,
      per_epoch * config.eval.every_epochs,
      config.checkpoint_every_steps,
      config.log_every_steps,
    )

  def evaluates(self, step: int) -> bool:
    return step == self.total_steps or step % self.evaluate_every == 0

  def saves(self, step: int) -> bool:
    return self.evaluates(step) or step % self.save_every == 0

  def logs(self, step: int) -> bool:
    return self.saves(step) or step % self.log_every == 0


def _run_steps(
  config, plan: Plan, workdir, state, start: int, batches, train_step, evaluate_state, checkpoints,
  parallel,
) -> tuple[TrainState, evaluate.Evaluation]:  # fmt: skip
  """Steps start + 1 to the last: last state and evaluation. See `train` for what it raises."""
  schedule = optimizer.learning_rate(config.optimizer, plan.steps_per_epoch, plan.total_steps)
  with (
    logs.Log(workdir, start) as log,
    Progress(config, start, plan.total_steps, plan.steps_per_epoch) as progress,
    Interruption() as interruption,
  ):
    for step in range(start + 1, plan.total_steps + 1):
      state, metrics = train_step(state, next(batches))
      progress.stepped(metrics)
      signal = interruption.signal  # Once: it may come at any moment.
      epoch = step / plan.steps_per_epoch
      if plan.logs(step) or signal:
        values = progress.read(parallel)
        values["learning_rate"] = float(schedule(step - 1))
        log.scalars(step, epoch, {f"train/{k}": v for k, v in values.items()})
        checkpoints.poll()
      evaluation, metric, results = None, None, None
      if plan.evaluates(step):
        evaluation = evaluate_state(state, step)
        results, metric = evaluation.results, evaluate.best_metric(evaluation.results)
        log.scalars(step, epoch, recall_scalars(results))
        progress.say(f"step {step}: {config.eval.best_metric} = {metric:.2f} %")
      if plan.saves(step) or signal:
        checkpoints.save(parallel.fetch(state), metric, results)
      if signal and step < plan.total_steps:
        checkpoints.require(step)
        raise Interrupted(step, signal)
  return state, evaluation


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
    averaged = config.optimizer.ema_decay > 0
    return TrainState.create(variables, optimizer.create(config, 1, 1), averaged=averaged)

  evaluations = {}
  with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
    steps = {"best": checkpoints.best_step(), "last": max(checkpoints.steps(), default=None)}
    if steps[which] is None:
      raise FileNotFoundError(
        f"{workdir / 'checkpoints'}: holds no {which} checkpoint; the best is chosen among those "
        f"that were evaluated in training"
      )
    # The other one, too, unless it is the same: neither should be reported alone. The one asked
    # for comes last, its state is drawn.
    for name in sorted(steps, key=lambda name: name == which):
      step = steps[name]
      if name == which or step not in (None, steps[which]):
        state = parallel.replicate(checkpoints.restore(step, jax.eval_shape(like)))
        evaluations[name] = _evaluate(encoder, state, dataset, vocabulary, step, name)
  evaluation = evaluations.pop(which)
  if steps["best"] == steps["last"]:
    evaluation.results["also"] = "best" if which == "last" else "last"
  if evaluations:
    evaluation.results["beside"] = [other.results for other in evaluations.values()]
  return _conclude(encoder, state, vocabulary, workdir, dataset, evaluation)


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
  return evaluate.evaluate(encoder, state.eval_variables(), dataset, vocabulary, step, which)


def _conclude(encoder, state, vocabulary, workdir, dataset, evaluation) -> str:
  written = report.write(encoder, state.eval_variables(), vocabulary, workdir, dataset, evaluation)
  shown = tables.results_as_text(evaluation.results)
  return "\n".join([shown, "", "written:", *(f"  {p}" for p in written)])
