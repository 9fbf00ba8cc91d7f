"""The one exception of this package."""


class CheckpointError(ValueError):
  """A folder of weights that cannot be read or written, in one sentence.

  The message names the file and the tensor.
  """
