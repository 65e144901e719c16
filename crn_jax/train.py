"""The training loop, for any method: data, update, logs, checkpoints, evaluation."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
from collections.abc import Callable, Iterator

import jax
import ml_collections
import optax

from crn_jax import (
  configuration,
  evaluate,
  feature_training,
  pretrained,
  processes,
  stages,
  state,
  training_step,
)
from crn_jax.errors import UserError
from crn_jax.evaluate import Evaluation
from crn_jax.input_pipeline import loader
from crn_jax.input_pipeline.checks import missing
from crn_jax.input_pipeline.dataset import Dataset
from crn_jax.input_pipeline.registry import open_dataset
from crn_jax.input_pipeline.remarks import remarks
from crn_jax.input_pipeline.tokenizers import base as tokenizers
from crn_jax.input_pipeline.tokenizers.base import Tokenizer
from crn_jax.methods import optimizer, registry
from crn_jax.methods.base import Method, TrainState
from crn_jax.methods.features import FeatureMethod
from crn_jax.parallel import AXIS, DataParallel, is_primary
from crn_jax.reports import tables
from crn_jax.reports.results import Results
from crn_jax.retrieval.encode import Encoder, picture_sizing
from crn_jax.retrieval.features import FeatureEncoder, Features
from crn_jax.workdir import checkpoint, logs, run
from crn_jax.workdir.checkpoint import CheckpointReader, Checkpoints
from crn_jax.workdir.interrupt import Interrupted, Interruption
from crn_jax.workdir.lock import lock
from crn_jax.workdir.profile import Profile
from crn_jax.workdir.progress import Progress


def train(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike, *, overwrite: bool = False
) -> str:
  """Trains in `workdir`, continuing from its last checkpoint if there is one, and evaluates.

  A training that comes before it (`stages`) is done first, or continued, in a folder inside.

  Of several processes (docs/cluster.md) all call it; the primary one writes, prints and draws.

  Args:
    config: see `configs/default.py`.
    workdir: gets what `docs/runs.md` lists.
    overwrite: whether a run that is there is removed first.

  Returns:
    The results of the final parameters and the paths written, for people to read; '' in other
    processes than the primary one.

  Raises:
    UserError: on a bad configuration or bad data, before anything is written; if a loss is not
      finite, the device's memory too small, or the last checkpoint could not be written; if
      processes differ in what must be equal.
    Interrupted: after SIGINT or SIGTERM, with the state saved.
  """
  workdir = pathlib.Path(workdir)
  processes.check_shared(workdir)
  training = Training.prepare(config, workdir, overwrite=overwrite)
  first = stages.fine_tuning(config)
  before = first and Training.prepare(
    first, workdir / run.TOWERS, overwrite=overwrite, dataset=training.dataset
  )
  with contextlib.ExitStack() as held:
    processes.on_primary(lambda: training.begin(held, overwrite=overwrite))
    weights_folder = pathlib.Path(stages.towers(config, workdir))
    if before is not None and processes.on_primary(lambda: not weights_folder.exists()):
      with contextlib.ExitStack() as held_before:
        processes.on_primary(lambda: before.begin(held_before))
        processes.say(before.run())
        processes.on_primary(lambda: before.export_towers(weights_folder))
    return training.run()


@dataclasses.dataclass(frozen=True)
class Training:
  """What a training works with, from its first to its last step.

  Attributes:
    config: the whole configuration.
    workdir: folder of the run.
    resumes: whether it continues from a checkpoint.
    parallel: layout over devices.
    dataset, vocabulary: what it trains on.
    method, tx: what is trained, and by which optimizer.
    plan: what is due at which step.
  """

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  resumes: bool
  parallel: DataParallel
  dataset: Dataset
  vocabulary: Tokenizer
  method: Method
  tx: optax.GradientTransformation
  plan: "Plan"

  @classmethod
  def prepare(
    cls,
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    *,
    overwrite: bool,
    dataset: Dataset | None = None,
  ) -> "Training":
    """Checks everything that can be checked before the first step; writes nothing.

    Args:
      config, workdir, overwrite: see `train`.
      dataset: if it was opened already.

    Raises:
      UserError: see `train`.
    """
    n_devices = jax.device_count()
    configuration.check(config, train_devices=n_devices, eval_devices=n_devices)
    run.check_folder(workdir)
    if not registry.METHODS[config.method].trains:
      raise UserError(
        f"method {config.method!r}: there is nothing to train; evaluate it with --mode=eval"
      )
    processes.check_alike(config)
    parallel = DataParallel.create(config.parallel.mode)
    resumes = bool(checkpoint.steps(workdir / "checkpoints")) and not overwrite
    if resumes:
      run.check_config(config, workdir, run.free_fields(config))
    else:
      state.check_pretrained(config)
    registry.create(config, vocab_size=1)  # Before data are read, for its errors.
    if dataset is None:
      dataset = _open_dataset(config, train=True, known_digest=run.known_digest(workdir))
    if resumes:  # A converted model has other words than the data.
      run.check_data(dataset.fingerprint, workdir)
      vocabulary = tokenizers.load(workdir / "vocab.json")
    else:
      vocabulary = pretrained.new_tokenizer(config, dataset.train.captions)
    plan = Plan.create(config, len(dataset.train.triplets))
    method = registry.create(config, len(vocabulary), AXIS)
    tx = method.optimizer(plan.steps_per_epoch, plan.total_steps)
    # No process writes before all have read.
    processes.check_equal(
      {
        "whether a run is continued": resumes,
        "the training triplets": dataset.fingerprint,
        "the number of words": len(vocabulary),
      },
      "Start the same command everywhere, on the same data and work directory",
    )
    return cls(config, workdir, resumes, parallel, dataset, vocabulary, method, tx, plan)

  @property
  def towers(self) -> str:
    """Folder of the weights that training starts from, or whose features it learns on."""
    return stages.towers(self.config, self.workdir)

  @functools.cached_property
  def features(self) -> Features:
    """Of a `FeatureMethod`: the features that it learns on; computed where they are not kept."""
    try:
      return feature_training.open_features(
        self.method, self.parallel, self.dataset, self.vocabulary, self.workdir, begins=True
      )
    except KeyboardInterrupt:  # What was computed is kept.
      step = max(checkpoint.steps(self.workdir / "checkpoints"), default=0)
      raise Interrupted(step, signal.SIGINT) from None

  @functools.cached_property
  def encoder(self) -> Encoder | FeatureEncoder:
    """How the method is evaluated."""
    if isinstance(self.method, FeatureMethod):
      return FeatureEncoder.create(self.method, self.parallel, self.features)
    return Encoder.create(self.method, self.parallel)

  @functools.cached_property
  def abstract_state(self) -> TrainState:
    """Shapes of the state; tracing a large model takes seconds, so that it is done once."""
    return state.abstract(self.method)

  def describe(self) -> str:
    """What is about to be done, for people to read."""
    train = self.dataset.train
    n_params = sum(x.size for x in jax.tree.leaves(self.abstract_state.params))
    lines = [
      f"{self.dataset.name}: {len(train.triplets)} triplets of {len(train.image_paths)} images, "
      f"{len(self.vocabulary)} words",
      f"{self.config.preset}: {n_params:,} parameters; {self.config.num_epochs} epochs of "
      f"{self.plan.steps_per_epoch} steps; {self.parallel.mode} on {len(self.parallel.devices)} x "
      f"{self.parallel.devices[0].device_kind}",
      f"work directory {self.workdir}",
      f"initial values: {self._origin()}",
    ]
    lines += remarks(self.dataset, self.vocabulary, self.config.seed)
    if self.dataset.skipped:
      lines.append(missing.describe_skipped(self.dataset.skipped))
    return "\n".join(lines)

  def begin(self, held: contextlib.ExitStack, *, overwrite: bool = False) -> None:
    """Takes the folder, as long as `held` lasts, and writes what it says about the run."""
    self.workdir.mkdir(parents=True, exist_ok=True)
    held.enter_context(lock(self.workdir))
    if overwrite:
      run.remove(self.workdir)
    run.save_config(self.config, self.workdir)
    run.save_data(
      self.workdir,
      fingerprint=self.dataset.fingerprint,
      image_digest=self.dataset.image_digest,
    )
    self.vocabulary.save(self.workdir / "vocab.json")

  def run(self) -> str:
    """Says what is to be done, trains to the last step, evaluates and draws; see `train`."""
    processes.say(self.describe())
    try:
      return self._run()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise UserError(
        f"out of memory on {self.parallel.devices[0].device_kind}: "
        f"{str(error).splitlines()[0]}\nA lower batch_size or data.image_size, "
        f"model.dtype=bfloat16 or a smaller backbone needs less; as long as {self.workdir} holds "
        f"no checkpoint any of them may be changed there"
      ) from error

  def export_towers(self, folder: pathlib.Path) -> None:
    """Writes the towers of the best checkpoint as a folder of weights."""
    with CheckpointReader(self.workdir / "checkpoints") as checkpoints:
      step = checkpoints.best_step()
      params = self.abstract_state.evaluated_field
      fields = checkpoints.restore_fields(step, self.abstract_state, (params,))
    (part,) = self.method.parts
    pretrained.save(self.config, fields[params][part]["encoder"], step, self.workdir, folder)

  def _run(self) -> str:
    train_step = self._train_step()
    with contextlib.ExitStack() as opened:
      checkpoints = processes.primary_first(
        lambda told: opened.enter_context(
          (CheckpointReader if told else Checkpoints)(self.workdir / "checkpoints")
        ),
        lambda _: "opened",
      )
      start_state = self._start_state(checkpoints)
      start = int(start_state.step)
      if jax.process_count() > 1:
        processes.check_equal(
          {"the checksum of the first parameters": checkpoint.checksum(start_state)},
          "Use machines of one kind, or the same weights everywhere (model.pretrained)",
        )
      placed = self.parallel.replicate(start_state)
      del start_state
      if start == self.plan.total_steps:  # The run was complete already.
        evaluation = self._evaluate(placed, start)
      else:
        placed, evaluation = self._steps(train_step, placed, start, checkpoints)
      processes.on_primary(lambda: checkpoints.require(self.plan.total_steps))
      results = evaluation.results
      if is_primary():
        results = self._with_best(results, checkpoints)
    evaluation = dataclasses.replace(evaluation, results=results)
    shown = conclude(
      self.encoder, placed.eval_variables(), self.vocabulary, self.workdir, self.dataset, evaluation
    )
    with logs.Log(self.workdir, self.plan.total_steps) as log:
      log.pictures(self.plan.total_steps, sorted((self.workdir / "pictures").glob("*.png")))
    return shown

  def _start_state(self, checkpoints: CheckpointReader) -> TrainState:
    if self.resumes:
      like = self.abstract_state
      restored = processes.primary_first(  # Which sets damaged ones aside.
        lambda step: checkpoints.restore_last(like) if step is None
        else checkpoints.restore(step, like),
        lambda state: int(state.step),
      )  # fmt: skip
      processes.say(f"continuing from the checkpoint at step {int(restored.step)}")
      if restored.step > self.plan.total_steps:
        raise UserError(
          f"num_epochs = {self.config.num_epochs} end at step {self.plan.total_steps}; the run in "
          f"{self.workdir} is at step {int(restored.step)} already. Ask for more, or evaluate it "
          f"with --mode=eval"
        )
      return restored
    initial = state.initial(self.method, self.tx, self.towers)
    if is_primary():
      checkpoints.check_space(initial)
    return initial

  def _train_step(self) -> Callable:
    """The training step, which is being compiled while its arguments are read and placed."""
    done = max(checkpoint.steps(self.workdir / "checkpoints"), default=0)
    if done >= self.plan.total_steps:  # Only if that checkpoint turns out to be damaged.
      return training_step.compiled(self.method, self.tx, self.parallel)
    return training_step.compiled_ahead(self.method, self.tx, self.parallel, self.abstract_state)

  def _steps(
    self, train_step: Callable, placed: TrainState, start: int, checkpoints: CheckpointReader
  ) -> tuple[TrainState, Evaluation]:
    """Steps start + 1 to the last: last state and evaluation."""
    plan, config = self.plan, self.config
    schedule = optimizer.learning_rate(config.optimizer, plan.steps_per_epoch, plan.total_steps)
    batches = self._batches(start)
    with (
      logs.Log(self.workdir, start) as log,
      Progress(config, start, plan.total_steps, plan.steps_per_epoch, plan.stride) as progress,
      Interruption() as interruption,
      Profile(self.workdir, config.profile_steps) as profile,
    ):
      for step in range(start + plan.stride, plan.total_steps + 1, plan.stride):
        profile.before(step)
        placed, metrics = train_step(placed, next(batches))
        profile.after(step, metrics)
        progress.stepped(metrics)
        stop = processes.agreed_stop(interruption.signal)  # Once: it may come at any moment.
        epoch = step / plan.steps_per_epoch
        if plan.logs(step) or stop:
          values = progress.read(self.parallel, checkpoints.steps())
          values["learning_rate"] = float(schedule(step - 1))
          log.scalars(step, epoch, {f"train/{k}": v for k, v in values.items()})
          if is_primary():
            checkpoints.poll()
        evaluation, metric, results = None, None, None
        if plan.evaluates(step):
          evaluation = self._evaluate(placed, step)
          metric, results = evaluation.results.best_value, evaluation.results.to_json()
          log.scalars(step, epoch, evaluation.results.scalars())
          progress.say(f"step {step}: {config.eval.best_metric} = {metric:.2f} %")
        if (plan.saves(step) or stop) and is_primary():
          checkpoints.save(self.parallel.copy(placed), metric, results)
        # After the last step there is nothing left to stop, but for a training that follows.
        if stop and (step < plan.total_steps or stages.is_first(config)):
          processes.on_primary(lambda step=step: checkpoints.require(step))
          raise Interrupted(step, stop)
    return placed, evaluation

  def _batches(self, start: int) -> Iterator:
    """Device batches of steps start .. total_steps - 1."""
    if isinstance(self.method, FeatureMethod):
      return feature_training.batches(
        self.method, self.parallel, self.dataset.train, self.vocabulary, self.features.train,
        start, self.plan.total_steps,
      )  # fmt: skip
    data = self.config.data
    batches = loader.train_batches(
      self.dataset.train,
      self.vocabulary,
      batch_size=self.config.batch_size,
      sizing=picture_sizing(self.method),
      augmentation=data.augment,
      seed=self.config.seed,
      start_step=start,
      num_steps=self.plan.total_steps,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      cache_images=data.cache_images,
    )
    return loader.under_way(batches, self.parallel.shard)

  def _evaluate(self, placed: TrainState, step: int) -> Evaluation:
    return evaluate.evaluate(
      self.encoder, placed.eval_variables(), self.dataset, self.vocabulary, step, "last"
    )

  def _with_best(self, results: Results, checkpoints: Checkpoints) -> Results:
    """The results of the last checkpoint with those of the best one beside them."""
    best = checkpoints.best_step()
    if best is None:
      return results
    if best == self.plan.total_steps:
      return dataclasses.replace(results, also="best")
    beside = dataclasses.replace(Results.from_json(checkpoints.results(best)), selection="best")
    return dataclasses.replace(results, beside=(beside,))

  def _origin(self) -> str:
    """Where the parameters come from; the order is that of docs/weights.md."""
    if self.resumes:
      return f"the last checkpoint in {self.workdir / 'checkpoints'}"
    if self.towers:
      what = {"backbone": "backbones", "encoder": "towers"}[self.method.pretrained]
      return f"{what} from {self.towers}, the rest random"
    return "random"


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is due at which step; steps count from 1, as updates done.

  Where several steps are done at once (`stride`), what falls between them is due behind them.
  """

  steps_per_epoch: int
  stride: int
  total_steps: int
  evaluate_every: int
  save_every: int
  log_every: int

  @classmethod
  def create(cls, config: ml_collections.ConfigDict, n_triplets: int) -> "Plan":
    """From the whole configuration and the number of training triplets."""
    per_epoch = loader.steps_per_epoch(n_triplets, config.batch_size)
    scans = registry.uses_features(config.method) and registry.METHODS[config.method].scans_epoch
    return cls(
      per_epoch,
      per_epoch if scans else 1,
      per_epoch * config.num_epochs,
      per_epoch * config.eval.every_epochs,
      config.checkpoint_every_steps,
      config.log_every_steps,
    )

  def evaluates(self, step: int) -> bool:
    return step == self.total_steps or self._passes(step, self.evaluate_every)

  def saves(self, step: int) -> bool:
    return self.evaluates(step) or self._passes(step, self.save_every)

  def logs(self, step: int) -> bool:
    return self.saves(step) or self._passes(step, self.log_every)

  def _passes(self, step: int, every: int) -> bool:
    """Whether one of the steps just done is a multiple of `every`."""
    return step // every > (step - self.stride) // every


def evaluate_run(config: ml_collections.ConfigDict, workdir: str | os.PathLike, which: str) -> str:
  """Evaluates a trained run, or a method that is not trained.

  Nothing is rebuilt from the training data, and a training may go on in the folder meanwhile.
  Results on another data set than the run's go to `other_data/DATASET` in the folder, beside the
  run's own.

  Args:
    config: of the run; the fields in `run.fields_free_to_evaluate` may differ.
    workdir: of the run; of a method that is not trained, a folder for the results.
    which: 'best' or 'last' checkpoint.

  Returns:
    The results and the paths written, for people to read.

  Raises:
    UserError: if `workdir` holds no trained run, or the configuration is not the run's.
  """
  workdir = pathlib.Path(workdir)
  processes.check_shared(workdir)
  configuration.check(config, eval_devices=jax.device_count())
  processes.check_alike(config)
  if not registry.METHODS[config.method].trains:
    return _evaluate_untrained(config, workdir)
  run.check_trained(workdir)
  run.check_config(config, workdir, free=run.fields_free_to_evaluate(config, workdir))
  parallel = DataParallel.create(config.parallel.mode)
  vocabulary = tokenizers.load(workdir / "vocab.json")
  dataset = _open_dataset(config, train=False)
  method = registry.create(config, len(vocabulary), AXIS)
  encoder = feature_training.encoder_of_run(method, parallel, dataset, vocabulary, workdir)
  with CheckpointReader(workdir / "checkpoints") as checkpoints:
    # A training may write another one meanwhile.
    steps = processes.on_primary(
      lambda: {"best": checkpoints.best_step(), "last": max(checkpoints.steps(), default=None)}
    )
    if steps[which] is None:
      raise UserError(
        f"{workdir / 'checkpoints'}: holds no {which} checkpoint; the best is chosen among those "
        f"that were evaluated in training"
      )
  # The other one, too, unless it is the same: neither should be reported alone. The one asked
  # for comes last, its state is drawn.
  beside = []
  for name in sorted(steps, key=lambda name: name == which):
    step = steps[name]
    if name == which or step not in (None, steps[which]):
      variables = parallel.replicate(state.trained(method, workdir, step))
      evaluation = evaluate.evaluate(encoder, variables, dataset, vocabulary, step, name)
      if name != which:
        beside.append(evaluation.results)
  results = dataclasses.replace(
    evaluation.results,
    also=({"best", "last"} - {which}).pop() if steps["best"] == steps["last"] else None,
    beside=tuple(beside),
  )
  folder = workdir
  if run.is_elsewhere(config, workdir):
    chosen_by = run.load_config(workdir).eval.best_metric
    beside = tuple(dataclasses.replace(r, best_metric=chosen_by) for r in results.beside)
    results = dataclasses.replace(results, best_metric=chosen_by, beside=beside)
    folder = workdir / "other_data" / config.data.dataset
    processes.on_primary(lambda: run.save_config(config, folder))
  evaluation = dataclasses.replace(evaluation, results=results)
  return conclude(encoder, variables, vocabulary, folder, dataset, evaluation)


def _evaluate_untrained(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> str:
  """Evaluates a method on its pretrained weights alone; the folder gets the results only.

  Raises:
    UserError: see `evaluate_run`; or there are no weights, or a trained run is in the folder.
  """
  run.check_folder(workdir)
  if checkpoint.steps(workdir / "checkpoints"):
    raise UserError(f"{workdir}: holds a trained run; choose another --workdir for {config.method}")
  parallel = DataParallel.create(config.parallel.mode)
  vocabulary = pretrained.new_tokenizer(config, captions=())
  method = registry.create(config, len(vocabulary), AXIS)
  state.check_pretrained(config)  # Before data are read.
  dataset = _open_dataset(config, train=False)
  for line in remarks(dataset, vocabulary, config.seed):
    processes.say(line)
  encoder = Encoder.create(method, parallel)
  variables = parallel.replicate(state.initial_variables(method, config.model.pretrained))
  evaluation = evaluate.evaluate(encoder, variables, dataset, vocabulary, 0, "untrained")
  processes.on_primary(lambda: run.save_config(config, workdir))
  return conclude(encoder, variables, vocabulary, workdir, dataset, evaluation)


def conclude(encoder, variables, vocabulary, workdir, dataset, evaluation: Evaluation) -> str:
  """Writes the report of an evaluation, in the primary process.

  Returns:
    The results and the paths written, for people to read; '' in other processes.
  """
  shown = [
    evaluate.cases(encoder, variables, vocabulary, split, evaluation) for split in dataset.evals
  ]
  results, config = evaluation.results, encoder.method.config

  def write():
    from crn_jax.reports import report  # Late: matplotlib takes a second to import.

    written = report.write(config, workdir, results, evaluation.outcomes, shown, vocabulary)
    return "\n".join(
      [tables.results_as_text(results), "", "written:", *(f"  {path}" for path in written)]
    )

  text = processes.on_primary(write)
  return text if is_primary() else ""


def _open_dataset(
  config: ml_collections.ConfigDict, *, train: bool, known_digest: str | None = None
) -> Dataset:
  """Opens the data in all processes, whose images the primary one checks.

  Raises:
    UserError: see `open_dataset`; in all processes.
  """
  dataset = processes.primary_first(
    lambda told: open_dataset(config.data, train=train, known_digest=told or known_digest),
    lambda dataset: dataset.image_digest,
  )
  processes.check_same_queries(dataset.evals)
  return dataset
