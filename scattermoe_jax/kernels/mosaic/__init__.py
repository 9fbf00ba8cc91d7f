"""Placeholder."""


def check(problem):
  """Not here yet."""
  return "not built"
