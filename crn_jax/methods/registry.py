"""Methods by name."""

import ml_collections

from crn_jax.errors import UserError
from crn_jax.methods import bank, clip4cir, crn, crn_towers, single, zero_shot
from crn_jax.methods.base import Method
from crn_jax.methods.features import FeatureMethod
from crn_jax.models.backbones.registry import check_prepared

METHODS: dict[str, type[Method]] = {
  "crn": crn.CRN,
  "crn_towers": crn_towers.CRNTowers,
  "single": single.SingleBranch,
  "zero_shot": zero_shot.ZeroShot,
  "fine_tuning": clip4cir.FineTuning,
  "clip4cir": clip4cir.Clip4Cir,
  "bank": bank.Bank,
}


def uses_features(name: str) -> bool:
  """Whether a method, a key of `METHODS`, learns on features of frozen towers."""
  return issubclass(METHODS[name], FeatureMethod)


def create(
  config: ml_collections.ConfigDict, vocab_size: int, axis_name: str | None = None
) -> Method:
  """The method that a configuration names.

  Args:
    config: the whole configuration; `config.method` is a key of `METHODS`.
    vocab_size: number of word ids.
    axis_name: mapped axis over which the batch is split, if any.

  Raises:
    UserError: unknown method, or a configuration that it refuses.
  """
  if config.method not in METHODS:
    raise UserError(f"method: unknown {config.method!r}; choose one of {', '.join(METHODS)}")
  method = METHODS[config.method](config, vocab_size, axis_name)
  check_prepared(config.data.prepared, method.preprocessing)
  return method
