"""Errors meant for users."""


class UserError(ValueError):
  """Something that the user can mend: data, weights, a configuration, a work directory.

  The message names the file or field, says what was expected and how to mend it; programs show it
  alone. Any other exception is a fault of this program or of its use, and keeps its traceback.
  """
