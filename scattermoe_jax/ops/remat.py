"""What a rematerialised layer keeps between its forward and its backward."""

from collections.abc import Callable

import jax

from scattermoe_jax.ops import checks

_POLICIES: dict[str, Callable[..., bool]] = {
  "nothing": jax.checkpoint_policies.nothing_saveable,
  "h": jax.checkpoint_policies.save_only_these_names("smoe_h"),
  "everything": jax.checkpoint_policies.everything_saveable,
}


def remat_policy(keep: str) -> Callable[..., bool]:
  """Returns a policy for `jax.checkpoint` or `nn.remat`, by what it keeps.

  Args:
    keep: beyond the layer's input: "nothing" (the layer runs again whole), "h"
      (the pre-activation of every `smoe_mlp`, so that its up-projection does
      not run again), or "everything".

  Raises:
    ValueError: if `keep` is none of these.

  Example:
    >>> layer = jax.checkpoint(jnp.sin, policy=remat_policy("h"))
  """
  checks.check_one_of("remat_policy", "keep", keep, tuple(_POLICIES))
  return _POLICIES[keep]
