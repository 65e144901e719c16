"""The colours of pictures and pages, all of them here: "#rrggbb", as every library takes them."""

# Okabe and Ito's palette, whose colours are told apart with every kind of colour blindness.
BLUE = "#0072b2"
VERMILLION = "#d55e00"
GREEN = "#009e73"
PURPLE = "#cc79a7"
SKY = "#56b4e9"
ORANGE = "#e69f00"
BLACK = "#000000"
# Of lines and bars, in this order; without the palette's yellow, which is too light on white.
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE, BLACK)

# Pictures are drawn on white; a page follows the reader's choice.
LIGHT = {
  "ink": "#1c1c1e",
  "faint": "#5f5f64",
  "rule": "#d8d8dc",
  "background": "#ffffff",
  "warn": "#8a3d00",
  "warn-background": "#fff1e6",
}
DARK = {
  "ink": "#ececee",
  "faint": "#a6a6ac",
  "rule": "#3c3c41",
  "background": "#18181a",
  "warn": "#ffb680",
  "warn-background": "#3a2413",
}
PRINT = LIGHT | {"ink": "#000000", "faint": "#444444", "rule": "#bbbbbb"}

INK, FAINT, RULE, WHITE = (LIGHT[name] for name in ("ink", "faint", "rule", "background"))
EMPTY = "#eeeef0"  # Around an image that does not fill its cell.
UNREADABLE = "#bebec2"  # In place of an image that cannot be read.
