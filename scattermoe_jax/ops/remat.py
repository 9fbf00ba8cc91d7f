"""What a rematerialised layer keeps between its forward and its backward."""

from collections.abc import Callable

import jax

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
  if keep not in _POLICIES:
    raise ValueError(
      f"remat_policy: keep must be one of {tuple(_POLICIES)}, got {keep!r}."
    )
  return _POLICIES[keep]
