"""A finished tile leaves in pieces between the products of the next one.

It is held in 16 bits meanwhile, and the tensor core does not wait for it.
"""

from collections.abc import Callable, Sequence

from jax.experimental import pallas as pl

from scattermoe_jax.kernels.mosaic import layouts as lt


def store_between(
  pieces: Sequence[Callable[[], None]], step, *, at_once: int = 1
) -> None:
  """Stores the pieces that are due at a step.

  Args:
    pieces: they store one each, in order.
    step: of the next tile, counted from 0.
    at_once: how many pieces leave at a step.
  """
  if not pieces:
    return

  @pl.when(step < lt.cdiv(len(pieces), at_once))  # One branch at most steps.
  def _():
    for i, store in enumerate(pieces):
      pl.when(step == i // at_once)(store)
