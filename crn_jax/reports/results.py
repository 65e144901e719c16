"""Results of an evaluation, as eval.json holds them: plain values, for people and for programs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from crn_jax.errors import UserError

QUERY_KINDS = ("composed", "image_only", "text_only")


@dataclasses.dataclass(frozen=True)
class Recalls:
  """Metrics over some queries.

  Attributes:
    percent: name of the metric, e.g. "R@10" -> percent.
    intervals: the same names -> (low, high), 95 % interval in percent.
    counts: "gallery" (images ranked) or "n_queries", where they are of use.
  """

  percent: Mapping[str, float]
  intervals: Mapping[str, tuple[float, float]]
  counts: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def to_json(self) -> dict:
    intervals = {name: list(ends) for name, ends in self.intervals.items()}
    return {**self.counts, **self.percent, "intervals": intervals}

  @classmethod
  def from_json(cls, content: Mapping) -> "Recalls":
    counts = {k: content[k] for k in ("gallery", "n_queries") if k in content}
    percent = {k: v for k, v in content.items() if k not in (*counts, "intervals")}
    return cls(percent, {k: tuple(v) for k, v in content["intervals"].items()}, counts)


@dataclasses.dataclass(frozen=True)
class Summary:
  """Metrics of one split, or means over several.

  Attributes:
    n_queries: number of queries.
    protocols: protocol -> its metrics.
    by_query: kind of query -> metrics in the breakdown protocol.
    by_text_kind: kind of text -> the same; None if the data set knows no kinds.
  """

  n_queries: int
  protocols: Mapping[str, Recalls]
  by_query: Mapping[str, Recalls]
  by_text_kind: Mapping[str, Recalls] | None = None

  def to_json(self) -> dict:
    content = {"n_queries": self.n_queries}
    for name in ("protocols", "by_query", "by_text_kind"):
      if (parts := getattr(self, name)) is not None:
        content[name] = {key: part.to_json() for key, part in parts.items()}
    return content

  @classmethod
  def from_json(cls, content: Mapping) -> "Summary":
    parts = {
      name: {key: Recalls.from_json(part) for key, part in content[name].items()}
      for name in ("protocols", "by_query", "by_text_kind")
      if name in content
    }
    return cls(content["n_queries"], **parts)


@dataclasses.dataclass(frozen=True)
class Results:
  """What an evaluation found.

  Attributes:
    dataset: e.g. "fashioniq/dress".
    checkpoint_step: training step of what was evaluated.
    selection: how the checkpoint was chosen, "last" or "best"; "untrained" if there is none.
    captions: how the captions of a query are used; "single" if there is nothing to join.
    exclude_reference: whether a query's own reference image is not ranked.
    best_metric: that by which the best checkpoint is chosen, e.g. "val_split/R@10".
    breakdown_protocol: that of `summary.by_query` and `summary.by_text_kind`.
    summary: over all splits.
    categories: split -> its own, if there are several.
    ceilings: R@10 in percent that half a query could reach, where the data set knows it.
    skipped: what `data.on_missing = 'skip'` left out, see `Dataset.skipped`.
    also: "best" or "last", if the evaluated checkpoint is that one, too.
    beside: results of the other checkpoint, so that neither is reported alone.
  """

  dataset: str
  checkpoint_step: int
  selection: str
  captions: str
  exclude_reference: bool
  best_metric: str
  breakdown_protocol: str
  summary: Summary
  categories: Mapping[str, Summary] = dataclasses.field(default_factory=dict)
  ceilings: Mapping[str, float] | None = None
  skipped: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  also: str | None = None
  beside: "tuple[Results, ...]" = ()

  @property
  def metrics(self) -> list[str]:
    """Names of what was measured, e.g. ['R@1', 'R@10']."""
    return list(next(iter(self.summary.protocols.values())).percent)

  @property
  def best_value(self) -> float:
    """The value that chooses the best checkpoint, in percent.

    Raises:
      UserError: if `best_metric` names nothing that was measured.
    """
    protocol, _, metric = self.best_metric.partition("/")
    try:
      return self.summary.protocols[protocol].percent[metric]
    except KeyError:
      known = [f"{p}/{m}" for p, recalls in self.summary.protocols.items() for m in recalls.percent]
      raise UserError(
        f"eval.best_metric = {self.best_metric!r} is not measured; choose one of {known}"
      ) from None

  def describe_selection(self) -> str:
    """How the evaluated checkpoint was chosen, in words."""
    if self.selection == "untrained":
      return "the pretrained weights, without any training"
    step, chosen = self.checkpoint_step, f"by {self.best_metric} on these queries"
    if self.selection == "best":
      also = ", which is the last one, too" if self.also else ""
      return f"best checkpoint (step {step}), chosen {chosen}{also}"
    also = f", which is the best {chosen}, too" if self.also else ""
    return f"last checkpoint (step {step}){also}"

  def scalars(self) -> dict[str, float]:
    """As TensorBoard shows them, e.g. {'eval/val_split/R@10': percent}."""
    return {
      f"eval/{protocol}/{metric}": value
      for protocol, recalls in self.summary.protocols.items()
      for metric, value in recalls.percent.items()
    }

  def to_json(self) -> dict:
    """As eval.json holds it; what is empty is left out."""
    content = {name: getattr(self, name) for name in _FACTS} | self.summary.to_json()
    if self.categories:
      content["categories"] = {name: part.to_json() for name, part in self.categories.items()}
    for name in ("ceilings", "skipped", "also"):
      if value := getattr(self, name):
        content[name] = value
    if self.beside:
      content["beside"] = [other.to_json() for other in self.beside]
    return content

  @classmethod
  def from_json(cls, content: Mapping) -> "Results":
    """Inverse of `to_json`.

    Raises:
      UserError: if parts are missing: an older version wrote it.
    """
    required = (*_FACTS, "n_queries", "protocols", "by_query")
    lacking = [name for name in required if name not in content]
    try:
      if not lacking:
        return cls(
          **{name: content[name] for name in _FACTS},
          summary=Summary.from_json(content),
          categories={k: Summary.from_json(v) for k, v in content.get("categories", {}).items()},
          **{k: content[k] for k in ("ceilings", "skipped", "also") if k in content},
          beside=tuple(cls.from_json(other) for other in content.get("beside", ())),
        )
    except KeyError as error:
      lacking = [str(error.args[0])]
    raise UserError(f"lacks {', '.join(lacking)}, so an older version wrote it")


_FACTS = ("dataset", "checkpoint_step", "selection", "captions", "exclude_reference", "best_metric",
          "breakdown_protocol")  # fmt: skip
