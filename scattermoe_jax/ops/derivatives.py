"""A clear refusal of second derivatives."""

import functools

import jax


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def first_derivative_only(function: str, tree):
  """Returns `tree`; raises NotImplementedError where it is differentiated.

  Put on the residuals and the cotangent of a hand-written backward, whose
  kernels have no derivative of their own.
  """
  del function
  return tree


@first_derivative_only.defjvp
def _refuse(function, primals, tangents):
  del primals, tangents
  raise NotImplementedError(
    f"{function}: second derivatives are not defined; its backward is a "
    "kernel. Differentiate once, or use finite differences of the gradient."
  )
