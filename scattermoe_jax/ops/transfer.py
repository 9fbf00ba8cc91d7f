"""Rows to the devices of their experts and back, each only where it belongs.

  device 0   | rows for 0 | rows for 1 |        | from 0 | from 1 |   .   |
                                           ->
  device 1   | rows for 0 | rows for 1 |        | from 0 |  from 1  |  .  |

How many rows go where is known at run time only. The buffer that takes them
holds every row of every device, should all choose the same experts, or what its
caller allows: rows past that are not sent.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from scattermoe_jax._compat import vary_over, varying_axes


class Transfer(NamedTuple):
  """Which rows a device sends to each other, and where they land there.

  Attributes:
    send_offsets: first row for each device, of the rows here.
    send_sizes: rows for each device.
    land_offsets: where they land in each device's buffer.
    receive_sizes: rows that come from each device.
  """

  send_offsets: Int[Array, " p"]
  send_sizes: Int[Array, " p"]
  land_offsets: Int[Array, " p"]
  receive_sizes: Int[Array, " p"]


def plan_transfer(
  send_sizes: Int[Array, " p"],
  most_rows: int,
  axis_name: str | tuple[str, ...],
) -> tuple[Transfer, Transfer]:
  """Returns the transfer of grouped rows and its reverse, inside `shard_map`.

  Args:
    send_sizes: rows of this device for each device of the axis, in order.
    most_rows: rows that a device takes, from the first devices first.
    axis_name: the mesh axes over which rows travel.
  """
  here = lax.axis_index(axis_name)
  table = lax.all_gather(send_sizes, axis_name)  # [from, to]
  # A device keeps what it sends, and what it receives, in order of devices.
  in_sender = jnp.cumsum(table, axis=1, dtype=table.dtype) - table
  in_receiver = jnp.cumsum(table, axis=0, dtype=table.dtype) - table
  in_receiver = jnp.minimum(in_receiver, most_rows)
  table = jnp.minimum(table, most_rows - in_receiver)
  forth = Transfer(
    in_sender[here], table[here], in_receiver[here], table[:, here]
  )
  back = Transfer(
    in_receiver[:, here], table[:, here], in_sender[:, here], table[here]
  )
  return forth, back


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def send_rows(
  rows: Shaped[Array, "here ..."],
  forth: Transfer,
  back: Transfer,
  num_rows: int,
  axis_name: str | tuple[str, ...],
) -> Shaped[Array, "there ..."]:
  """Returns the rows that the devices of an axis send here; zero for no row.

  Its gradient is the same with `forth` and `back` exchanged.

  Args:
    rows: the rows of this device.
    forth: their way.
    back: the way of the gradient.
    num_rows: rows of the result, at least those that can come.
    axis_name: the mesh axes over which rows travel.

  Residuals: the numbers of `forth` and `back`, and how many `rows` there are.
  """
  buffer = jnp.zeros((num_rows, *rows.shape[1:]), rows.dtype)
  buffer = vary_over(buffer, varying_axes(rows, forth))
  return lax.ragged_all_to_all(rows, buffer, *forth, axis_name=axis_name)


def _fwd(rows, forth, back, num_rows, axis_name):
  out = send_rows(rows, forth, back, num_rows, axis_name)
  # An array of no width remembers the number of rows.
  return out, (forth, back, jnp.zeros((rows.shape[0], 0), rows.dtype))


def _bwd(num_rows, axis_name, residuals, dout):
  del num_rows
  forth, back, widthless = residuals
  drows = send_rows(dout, back, forth, widthless.shape[0], axis_name)
  return drows, None, None


send_rows.defvjp(_fwd, _bwd)
