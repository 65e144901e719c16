"""The released CRN in PyTorch, for tests: written from the description of its mathematics alone.

No line of it is the release's, which has no licence; names and shapes of the parameters are, so
that one set of weights serves both and gradients are compared by name. What reaches no loss is left
out. The backbone is timm's. tests/methods/test_train_parity.py holds it to the release's numbers.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tests import torch_cpu  # isort: skip  # noqa: F401 (before timm, which imports torchvision)

import timm.models.swin_transformer as timm_swin  # isort: skip

TEMPERATURE = {"local": 7.0, "global": 4.0}


class Sides:
  """On which side of their kinks the inputs of ReLUs and clamps stand: recorded, or imposed.

  Attributes:
    above: one bool tensor for each kink, in the order of a pass.
  """

  def __init__(self, above: list[torch.Tensor] | None = None):
    self.above = [] if above is None else above
    self._imposed = None if above is None else iter(above)

  def __call__(self, x: torch.Tensor, kink: float) -> torch.Tensor:
    """x; where it is imposed that x stands elsewhere, the nearest value there, of slope one."""
    if self._imposed is None:
      self.above.append(x.detach() > kink)
      return x
    above = next(self._imposed)
    beside = torch.where(above, kink + 1e-12, kink - 1e-12).to(x.dtype)
    return torch.where((x > kink) == above, x, beside + (x - x.detach()))


class GeM(nn.Module):
  """Generalised mean over the trailing positions of [batch, channels, *positions]."""

  def __init__(self):
    super().__init__()
    self.p = nn.Parameter(torch.full((1,), 3.0))

  def forward(self, x, sides):
    x = sides(x.flatten(2), 1e-6).clamp(min=1e-6)
    return (x**self.p).mean(-1) ** (1 / self.p)


class BatchNorm(nn.Module):
  """By the batch's statistics, in the arithmetic of its input throughout."""

  def __init__(self, channels: int):
    super().__init__()
    self.weight, self.bias = (nn.Parameter(torch.zeros(channels)) for _ in range(2))
    self.register_buffer("running_mean", torch.zeros(channels))
    self.register_buffer("running_var", torch.zeros(channels))

  def forward(self, x, update_stats: bool):
    flat = x.transpose(0, 1).flatten(1)
    mean = flat.mean(1)
    # The variance has no gradient by way of the mean.
    var = (flat - mean.detach()[:, None]).square().mean(1)
    if update_stats:
      n = flat.shape[1]
      with torch.no_grad():
        self.running_mean.lerp_(mean, 0.1)
        self.running_var.lerp_(var * n / (n - 1), 0.1)
    shape = (-1, *[1] * (x.ndim - 2))
    mean, scale = mean.view(shape), ((var + 1e-5) ** -0.5 * self.weight).view(shape)
    return (x - mean) * scale + self.bias.view(shape)


class ConvUnit(nn.Module):
  """Convolution without bias, BatchNorm, ReLU."""

  def __init__(self, dims: int, inputs: int, outputs: int, width: int):
    super().__init__()
    conv = nn.Conv1d if dims == 1 else nn.Conv2d
    self.conv = conv(inputs, outputs, width, padding=width // 2, bias=False)
    self.bn = BatchNorm(outputs)

  def forward(self, x, sides, update_stats):
    return F.relu(sides(self.bn(self.conv(x), update_stats), 0.0))


class Inception(nn.Module):
  """Four branches, concatenated; widths are fractions of the input's and the output's."""

  def __init__(self, dims: int, inputs: int, outputs: int):
    super().__init__()

    def unit(*sizes):
      return ConvUnit(dims, *sizes)

    hidden, narrow = inputs // 4, inputs * 7 // 64
    first, second, third, last = (
      outputs * share // 16 for share in ((6, 4, 4, 2) if dims == 1 else (5, 4, 4, 3))
    )
    self.average = (nn.AvgPool1d if dims == 1 else nn.AvgPool2d)(3, 1, 1, count_include_pad=False)
    self.branch0 = unit(inputs, first, 1)
    self.branch1 = nn.ModuleList([unit(inputs, hidden, 1), unit(hidden, second, 3)])
    self.branch2 = nn.ModuleList(
      [unit(inputs, hidden, 1), unit(hidden, narrow, 3), unit(narrow, third, 3)]
    )
    self.branch3 = nn.ModuleList([nn.Identity(), unit(inputs, last, 1)])

  def forward(self, x, sides, update_stats):
    out = [self.branch0(x, sides, update_stats)]
    for start, units in ((x, self.branch1), (x, self.branch2), (self.average(x), self.branch3[1:])):
      for unit in units:
        start = unit(start, sides, update_stats)
      out.append(start)
    return torch.cat(out, 1)


class Composition(nn.Module):
  """Attention between words and positions, then gamma * base + beta."""

  def __init__(self, kind: str, map_dim: int, dim: int):
    super().__init__()
    self.kind = kind
    self.img1x1conv = nn.Conv2d(map_dim, dim, 1, bias=False)
    dims, outputs = (2, map_dim) if kind == "local" else (1, dim)
    self.inception_gamma = Inception(dims, 2 * dim, outputs)
    self.inception_beta = Inception(dims, 2 * dim, outputs)

  def forward(self, image, words, sides, update_stats):
    """[batch, map_dim, h, w], [batch, words, dim] -> [batch, map_dim, h, w] or [.., dim, words]."""
    e = self.img1x1conv(image).flatten(2)
    logits = words @ e / TEMPERATURE[self.kind]
    if self.kind == "local":
      base = image
      sentence = words.transpose(1, 2) @ logits.softmax(1)
      x = torch.cat([e, sentence], 1).unflatten(2, image.shape[2:])
    else:
      base = e @ logits.softmax(2).transpose(1, 2)
      x = torch.cat([words.transpose(1, 2), base], 1)
    gamma, beta = (
      unit(x, sides, update_stats) for unit in (self.inception_gamma, self.inception_beta)
    )
    return gamma * base + beta


class Branch(nn.Module):
  """One of the two models: `kind` is 'local' or 'global'."""

  def __init__(self, kind, vocab_size, word_dim, dim, map_dim, image_size, **swin):
    super().__init__()
    self.kind = kind
    self.loss_weight = nn.Parameter(torch.zeros(1))
    self.text_model = nn.Module()
    self.text_model.embedding_layer = nn.Embedding(vocab_size, word_dim)
    self.text_model.lstm = nn.LSTM(word_dim, dim, batch_first=True)
    self.img_model = nn.Module()
    self.img_model.img_model = timm_swin.SwinTransformer(
      img_size=image_size, num_classes=0, drop_path_rate=0.0, **swin
    )
    self.img_model.img1x1conv3 = nn.Conv2d(
      self.img_model.img_model.num_features, map_dim, 1, bias=False
    )
    self.img_model.img_pool = GeM()
    self.img_model.img_fc = nn.Linear(map_dim, dim)
    self.composition = Composition(kind, map_dim, dim)
    self.query_pool = GeM()
    self.query_fc = nn.Linear(map_dim if kind == "local" else dim, dim)

  def forward(self, batch: dict, sides: Sides, update_stats: bool) -> dict[str, torch.Tensor]:
    """Query and target vectors [batch, dim], composed and target map [batch, map_dim, 1, 1]."""
    n = len(batch["tokens"])
    features = self.img_model.img_model.forward_features(
      torch.cat([batch["reference"], batch["target"]])
    )
    maps = self.img_model.img1x1conv3(features.mean((1, 2))[:, :, None, None])
    vectors = self.img_model.img_fc(self.img_model.img_pool(maps, sides))
    words, _ = self.text_model.lstm(self.text_model.embedding_layer(batch["tokens"]))
    composed = self.composition(maps[:n], words, sides, update_stats)
    query = self.query_fc(self.query_pool(composed, sides))
    return {"query": query, "target": vectors[n:], "composed": composed, "map": maps[n:]}

  def release_state(self, of=lambda p: p) -> dict[str, torch.Tensor]:
    """Parameters and running statistics by the release's names, after a function of each."""
    named = (*self.named_parameters(), *self.named_buffers())
    return {
      self._release_name(n): of(v)
      for n, v in named
      if not n.endswith(("relative_position_index", "attn_mask"))
    }

  def _release_name(self, name: str) -> str:
    return name.replace("composition.", f"{self.kind}_fuse.").replace("query_", f"{self.kind}_")

  def load(self, value) -> None:
    """Sets all to `value(release's name, shape)`, an array."""
    with torch.no_grad():
      for name, p in self.release_state().items():
        p.copy_(torch.as_tensor(value(name, tuple(p.shape))))


def losses(kind: str, own: dict, teacher: dict, scale: torch.Tensor) -> dict[str, torch.Tensor]:
  """The terms by our names; no gradient enters the teacher."""
  labels = torch.arange(len(own["query"]))

  def logits(out):
    return F.normalize(out["query"]) @ F.normalize(out["target"]).T

  log_student = (10 * logits(own)).log_softmax(1)
  log_teacher = (10 * logits(teacher)).log_softmax(1).detach()
  terms = {
    "classification": F.cross_entropy(scale * logits(own), labels),
    "cross_branch": sum(F.mse_loss(own[k], teacher[k].detach()) for k in ("query", "target")),
    "mutual_kl": (log_teacher.exp() * (log_teacher - log_student)).sum() / len(labels),
  }
  if kind == "local":
    terms["perceptual"] = F.mse_loss(own["composed"], own["map"])
  return terms | {"total": sum(terms.values())}


class Trainer:
  """Both branches with Adam, in alternation: local, then global against the updated local.

  Attributes:
    branches: 'local' and 'global', trained in place.
  """

  def __init__(self, branches: dict[str, Branch], only_tries: bool = False):
    """Starts at the branches' weights.

    Args:
      branches: 'local' and 'global'.
      only_tries: whether no update is to be kept; needs less memory.
    """
    self.branches = branches
    self._steps = 0
    self._keep = not only_tries
    self._moments = {
      k: [(torch.zeros_like(p), torch.zeros_like(p)) for p in branches[k].parameters()]
      for k in (("local",) if only_tries else ("local", "global"))
    }

  def follow(self, other: "Trainer") -> None:
    """Takes over another trainer's state, rounded to the own precision."""
    self._steps = other._steps
    with torch.no_grad():
      for kind, branch in self.branches.items():
        for mine, theirs in zip(
          branch.release_state().values(), other.branches[kind].release_state().values(),
          strict=True,
        ):  # fmt: skip
          mine.copy_(theirs)
      for kind, moments in self._moments.items():
        for mine, theirs in zip(moments, other._moments[kind], strict=True):
          for moment, value in zip(mine, theirs, strict=True):
            moment.copy_(value)

  def __call__(self, batch: dict, sides: dict[str, Sides]) -> dict[str, float]:
    """One update; gradients stay in the parameters, also if the update is only tried.

    Args:
      batch: {reference, target: [batch, 3, height, width]; tokens: [batch, words]}.
      sides: of each branch's pass with gradients.

    Returns:
      Losses, by names such as 'local/total'.
    """
    out = {k: b(batch, sides[k], update_stats=self._keep) for k, b in self.branches.items()}
    metrics = {}
    for kind, branch in self.branches.items():
      teacher = out["global"]
      if kind == "global":
        with torch.no_grad():
          teacher = self.branches["local"](batch, Sides(), update_stats=False)
      terms = losses(kind, out[kind], teacher, branch.loss_weight)
      branch.zero_grad()
      terms["total"].backward()
      metrics |= {f"{kind}/{k}": v.item() for k, v in terms.items()}
      if self._keep:
        self._step(kind)
      elif kind == "local":  # Stepped for the teacher's sake, and back.
        before = [p.detach().clone() for p in branch.parameters()]
        self._step(kind)
    if not self._keep:
      with torch.no_grad():
        for p, value in zip(self.branches["local"].parameters(), before, strict=True):
          p.copy_(value)
    self._steps += self._keep
    return metrics

  @torch.no_grad()
  def _step(self, kind: str) -> None:
    """Adam with the weight decay added to the gradient."""
    t = self._steps + 1
    for p, moments in zip(self.branches[kind].parameters(), self._moments[kind], strict=True):
      g = p.grad.add(p, alpha=1e-6)
      m = moments[0].mul(0.9).add_(g, alpha=0.1)
      v = moments[1].mul(0.999).addcmul_(g, g, value=0.001)
      root = v.div(1 - 0.999**t).sqrt_().add_(1e-8)
      p.addcdiv_(m, root, value=-3e-5 / (1 - 0.9**t))
      if self._keep:
        moments[0].copy_(m)
        moments[1].copy_(v)
