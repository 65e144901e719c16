"""Draws one synthetic garment of the demo data set (`generate.py`).

A garment is a few polygons in its own coordinates: x from -1 to 1 across, y from -1 (shoulders) to
1 (floor) down. One random pose carries them to the picture, and carries the pattern with them. It
is drawn at twice the size and averaged down, which is cheap and smooths the edges.
"""

import numpy as np
from PIL import Image, ImageDraw

ATTRIBUTES = {
  "color": (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white",
  ),
  "pattern": ("solid", "striped", "dotted", "checked", "halved"),
  "sleeves": ("sleeveless", "short", "long"),
  "neckline": ("round", "v", "square"),
  "length": ("short", "medium", "long"),
  "hem": ("straight", "ruffled"),
}  # fmt: skip

_RGB = {
  "red": (205, 25, 35),
  "orange": (250, 130, 15),
  "yellow": (250, 222, 45),
  "green": (25, 135, 55),
  "blue": (35, 75, 210),
  "purple": (120, 45, 165),
  "pink": (255, 150, 195),
  "brown": (112, 66, 32),
  "black": (28, 28, 32),
  "white": (248, 248, 248),
}
# Trim and pattern are darker than these and lighter than the others, so that both can be seen.
_LIGHT_COLORS = ("orange", "yellow", "pink", "white")

# Half widths at shoulder, waist and floor, the height of the waist, and the hem's height for each
# length. Short, medium and long differ by more than the random scale can undo.
_SILHOUETTES = {
  "dress": {
    "shoulder": 0.42,
    "waist": 0.29,
    "floor": 0.80,
    "waist_y": -0.22,
    "hem_y": {"short": 0.22, "medium": 0.56, "long": 0.88},
  },
  "shirt": {
    "shoulder": 0.54,
    "waist": 0.50,
    "floor": 0.50,
    "waist_y": -0.10,
    "hem_y": {"short": 0.02, "medium": 0.42, "long": 0.82},
  },
  "toptee": {
    "shoulder": 0.47,
    "waist": 0.46,
    "floor": 0.76,
    "waist_y": -0.40,
    "hem_y": {"short": 0.02, "medium": 0.42, "long": 0.82},
  },
}
CATEGORIES = tuple(_SILHOUETTES)

_TOP = -0.88  # the height of the shoulders


def _neckline(name: str) -> np.ndarray:
  """Returns the [n, 2] points of the neckline from left to right."""
  # Openings of different depth and width: their outlines alone are too fine at 64 pixels.
  if name == "v":
    return np.array([[-0.27, _TOP], [0.0, _TOP + 0.68], [0.27, _TOP]])
  if name == "square":
    half, low = 0.32, _TOP + 0.34
    return np.array([[-half, _TOP], [-half, low], [half, low], [half, _TOP]])
  angle = np.linspace(np.pi, 0.0, 13)
  return np.stack([0.24 * np.cos(angle), _TOP + 0.18 * np.sin(angle)], axis=1)


def _hem(name: str, half: float, y: float) -> np.ndarray:
  """Returns the [n, 2] points of the hem from right to left."""
  if name == "straight":
    return np.array([[half, y], [-half, y]])
  x = np.linspace(half, -half, 41)
  # Scallops of a fixed width, so that a wide skirt has more of them than a top.
  n_scallops = max(3, round(2 * half / 0.26))
  phase = (half - x) / (2 * half) * n_scallops * np.pi
  return np.stack([x, y - 0.07 + 0.15 * np.abs(np.sin(phase))], axis=1)


def _half_width(shape: dict, y: float) -> float:
  """Half of the garment's width at height y, at or below the waist."""
  share = (y - shape["waist_y"]) / (1.0 - shape["waist_y"])
  return shape["waist"] + share * (shape["floor"] - shape["waist"])


def _sleeve(name: str, shoulder: float, side: int) -> np.ndarray:
  """Returns the [4, 2] corners of a sleeve: shoulder, outer cuff, inner cuff, armpit."""
  reach = {"short": 0.40, "long": 1.06}[name]
  # Along the arm, away from the body far enough that background shows between them.
  direction = np.array([0.44, 0.90]) if name == "long" else np.array([0.62, 0.78])
  across = np.array([-direction[1], direction[0]])
  top = np.array([shoulder - 0.06, _TOP + 0.01])
  outer = top + direction * reach + np.array([0.05, 0.0])
  cuff = 0.21 if name == "long" else 0.29
  corners = np.array([top, outer, outer + across * cuff, [shoulder - 0.08, _TOP + 0.40]])
  return corners * np.array([side, 1.0])


def _pattern(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Returns how much of the pattern's colour is at garment coordinates (u, v), in [0, 1]."""
  if name == "solid":
    return np.zeros_like(u)
  if name == "striped":
    return (np.mod(v, 0.50) < 0.22).astype(np.float32)
  if name == "dotted":
    x = np.mod(u, 0.36) - 0.18
    y = np.mod(v, 0.36) - 0.18
    return (x * x + y * y < 0.10**2).astype(np.float32)
  if name == "checked":
    across = np.mod(u + 0.125, 0.50) < 0.25
    down = np.mod(v, 0.50) < 0.25
    return 0.5 * across.astype(np.float32) + 0.5 * down
  # Halved: one side of the garment.
  return (u > 0).astype(np.float32)


def _mix(color, other, share: float) -> np.ndarray:
  return (1.0 - share) * np.asarray(color, np.float32) + share * np.asarray(other, np.float32)


def _to_fill(color) -> tuple[int, int, int]:
  return tuple(int(c) for c in np.clip(color, 0, 255))


def draw_garment(category: str, values: dict[str, str], rng: np.random.Generator, image_size: int):
  """Draws one garment in a random pose and light.

  Args:
    category: one of `CATEGORIES`.
    values: attribute name -> value, for every attribute in `ATTRIBUTES`.
    rng: source of what is not an attribute: rotation (up to 4 degrees), scale (0.90 to 0.98),
      shift (up to 2.5 % of the picture), colour jitter, background shade and a lighting gradient.
    image_size: side of the picture in pixels.

  Returns:
    An RGB picture of image_size x image_size.
  """
  shape = _SILHOUETTES[category]
  side = 2 * image_size
  angle = np.deg2rad(rng.uniform(-4.0, 4.0))
  scale = rng.uniform(0.90, 0.98) * side / 2
  shift = side / 2 + rng.uniform(-0.025, 0.025, 2) * side
  rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  background = rng.uniform(150, 205) + rng.uniform(-10, 10, 3)
  base = np.clip(np.asarray(_RGB[values["color"]]) + rng.uniform(-10, 10, 3), 0, 255)
  light_angle, light = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.16)

  is_light = values["color"] in _LIGHT_COLORS
  second = _mix(base, (0, 0, 0), 0.70) if is_light else _mix(base, (255, 255, 255), 0.80)
  trim = _to_fill(_mix(base, (0, 0, 0), 0.75) if is_light else _mix(base, (255, 255, 255), 0.85))
  outline = _to_fill(_mix(base, (0, 0, 0), 0.45))

  def place(points):
    return [tuple(p) for p in points @ rotation.T * scale + shift]

  # Coordinates of every pixel in the garment's own frame, so that the pattern turns with it.
  pixel = (np.arange(side, dtype=np.float32) + 0.5)[:, None]
  x, y = (pixel.T - shift[0]) / scale, (pixel - shift[1]) / scale
  u = rotation[0, 0] * x + rotation[1, 0] * y
  v = rotation[0, 1] * x + rotation[1, 1] * y
  amount = _pattern(values["pattern"], u, v)[..., None]
  cloth = (base * (1.0 - amount) + second * amount).astype(np.uint8)

  picture = Image.new("RGB", (side, side), _to_fill(background))
  line = max(1, round(side / 64))

  def paste(points, texture):
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon(place(points), fill=255)
    picture.paste(Image.fromarray(texture), (0, 0), mask)
    ImageDraw.Draw(picture).line(place(np.concatenate([points, points[:1]])), outline, line)

  def stroke(points, fill, width):
    ImageDraw.Draw(picture).line(place(points), fill, width, joint="curve")

  sleeveless = values["sleeves"] == "sleeveless"
  if not sleeveless:
    shaded = (cloth * 0.86).astype(np.uint8)
    for direction in (-1, 1):
      corners = _sleeve(values["sleeves"], shape["shoulder"], direction)
      paste(corners, shaded)
      stroke(corners[1:3], trim, 2 * line)

  hem_y = shape["hem_y"][values["length"]]
  half = _half_width(shape, hem_y)
  neck, hem = _neckline(values["neckline"]), _hem(values["hem"], half, hem_y)
  # Without sleeves the armholes are cut in, so that straps remain.
  shoulder = shape["shoulder"] - (0.04 if sleeveless else 0.0)
  inner = shape["shoulder"] - (0.10 if sleeveless else 0.0)
  chest = max(shape["waist"], shape["shoulder"] - 0.04)
  right = np.array([
    [shoulder, _TOP + 0.05],
    [inner, _TOP + 0.22],
    [chest, _TOP + 0.42],
    [shape["waist"], shape["waist_y"]],
  ])  # fmt: skip
  left = right[::-1] * np.array([-1.0, 1.0])
  paste(np.concatenate([neck, right, hem, left]), cloth)

  if category == "dress":  # a belt
    belt = np.array([[-shape["waist"], shape["waist_y"]], [shape["waist"], shape["waist_y"]]])
    stroke(belt, outline, 2 * line)
  if category == "shirt":  # a placket with buttons
    stroke(np.array([[0.0, -0.36], [0.0, hem_y - 0.02]]), outline, line)
    for button_y in np.arange(-0.28, hem_y - 0.08, 0.2):
      (cx, cy), r = place(np.array([[0.0, button_y]]))[0], 0.032 * scale
      ImageDraw.Draw(picture).ellipse((cx - r, cy - r, cx + r, cy + r), fill=trim)
  stroke(neck, trim, 2 * line)
  stroke(hem, trim, 7 * line if values["hem"] == "ruffled" else line)

  pixels = np.asarray(picture.reduce(2), np.float32)
  t = np.linspace(-1.0, 1.0, image_size, dtype=np.float32)
  gradient = np.cos(light_angle) * t[None, :] + np.sin(light_angle) * t[:, None]
  pixels = pixels * (1.0 + light * gradient)[..., None]
  return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
