"""Texts that can be drawn and written."""


def printable(text: str) -> str:
  """The text with "?" for what UTF-8 cannot hold: bytes of paths in another encoding."""
  return text.encode("utf-8", "replace").decode("utf-8")
