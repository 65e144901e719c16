"""DCNet's equations (Kim et al., AAAI 2021) in NumPy and float64, an expert at a time."""

import numpy as np

from crn_jax.models.composition.dcnet import EXPERTS, POSITIONS


class ByHand:
  """The paper's equations for one query and one target, in NumPy and float64."""

  def __init__(self, params):
    self.params = params

  def linear(self, x, *path):
    p = self.params
    for name in path:
      p = p[name]
    return x @ p["kernel"] + p["bias"]

  def fc(self, x, *path):
    return np.maximum(self.linear(x, *path, "linear"), 0)

  def image(self, before, last):
    """Eq. (1) and (2)."""
    seen = [before.mean((0, 1)), last.mean((0, 1))] + [last[y, x] for x, y in POSITIONS]
    return [unit(self.fc(v, "image_experts", f"expert{i}")) for i, v in enumerate(seen)]

  def text(self, words):
    """Eq. (4); words without padding."""
    result = []
    for e in range(EXPERTS):
      m = self.params["text_experts"]["queries"][e]
      scores = [
        (self.fc(m * w, "text_experts", "hidden") @ self.params["text_experts"]["score"]["kernel"])[
          0
        ]
        for w in words
      ]
      alpha = np.exp(scores) / np.sum(np.exp(scores))
      attended = sum(a * w for a, w in zip(alpha, words, strict=True))
      result.append(unit(self.fc(attended, "text_experts", f"expert{e}")))
    return result

  def composition(self, x, t):
    """Eq. (5) to (8)."""
    t = np.concatenate([t, x * t])
    z = np.concatenate([x, t])
    gate = 1 / (1 + np.exp(-self.linear(z, "composing", "gate"))) * x
    residual = self.fc(self.fc(z, "composing", "hidden"), "composing", "residual")
    w_g, w_r = self.params["composing"]["weights"]
    return w_g * gate + w_r * residual

  def correction(self, x, y):
    """Eq. (10) to (12)."""
    of_target = self.fc(np.concatenate([y * x, y]), "correcting", "target")
    of_reference = self.fc(np.concatenate([y * x, x]), "correcting", "reference")
    z = np.concatenate([x, y, of_target - of_reference])
    return self.fc(z, "correcting", "difference")

  def scores(self, x, t, y):
    """s_r, s_c and s_j: eq. (9), (13) and (17)."""
    s_r = s_c = s_j = 0
    for x_e, t_e, y_e in zip(x, t, y, strict=True):
      c, d = self.composition(x_e, t_e), self.correction(x_e, y_e)
      s_r += c @ y_e
      s_c += d @ t_e
      s_j += c @ self.composition(x_e, 0.5 * d + 0.5 * t_e)
    return s_r, s_c, s_j

  def length(self, x, t):
    """Of the query's vector whose product with an image's unit vector is s_r."""
    composed = [self.composition(x_e, t_e) for x_e, t_e in zip(x, t, strict=True)]
    return np.sqrt(EXPERTS) * np.linalg.norm(np.concatenate(composed))


def unit(x):
  return x / np.linalg.norm(x) if np.any(x) else x
