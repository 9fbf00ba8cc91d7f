"""Grouped products over routed rows: one contract, three backends.

A backend is a module with the functions below. None of them is differentiable;
`scattermoe_jax.ops` gives them gradients.

  check(problem) -> str | None
      why this backend cannot run `problem`, in words; None if it can.

  scatter2scatter(x, w, routing, *, bias, grouped_in, grouped_out, transpose_w,
                  columns, precision) -> y
      y[row] = x[row] @ w[expert of row] (+ bias[expert of row]); of y only the
      slice `columns` (`Columns`), if one is named, with no copy of that of w
      where a kernel can read it in place.

  group_xty(x, y, routing, *, x_grouped, y_grouped, precision) -> (E, d, n)
      xty[e] = x_e^T y_e over the rows of expert e; zero for an expert of none.

  up_projection(x, w, routing, *, bias, activation, keep_h, precision)
      -> (h or None, a)
      h = scatter2scatter(x, w, grouped_out=True); a = activation(h).

  down_projection(x, w, gates, routing, *, bias, grouped_in, num_chunks,
                  precision) -> (T, d)
      out[t] = sum_j gates[t, j] scatter2scatter(x, w)[row of choice j of t], in
      slices of columns; of one choice, no row is made but the result's.

  down_projection_grad(dy, w, h, gates, routing, *, activation, precision)
      -> (dh, weighted_a, dgates)
      The backward of `sum_j gates * (activation(h) @ w)` down to h:
      da' = dy w^T; dgates = <da', a>; dh = (gates * da') dact/dh;
      weighted_a = gates * a. All in grouped rows, w as the forward stores it.

  up_projection_grad(x, w, dh, routing, *, num_chunks, at_once, precision)
      -> (dx, dw)
      The backward of h = x w: dx[t] = sum_j dh[row of choice j of t] w^T, in
      slices of columns; dw = group_xty(x, dh). dh is grouped, and zero where a
      row is of no group. Neither result needs the other: one kernel may wait
      for memory and for the tensor core at once, if `at_once`; else dw is made
      last, when no rows of dx are left.

Rows: a scattered operand has S rows, or T rows of which the k choices of a
token share one; a grouped operand has S rows. Outputs of rows have S. Rows of
no group (`Routing`) are zero in every output. Sums are accumulated in float32
(float64 for float64) and stored in the dtype of x.
Source: ScatterMoE (Tan et al., 2024), scatter2scatter and groupXtY; SonicMoE
(Guo et al., 2025, arXiv 2512.14080), algorithm 3, for `down_projection_grad`.
"""

from scattermoe_jax._compat import current_device
from scattermoe_jax.kernels.composed import (
  gates_of_rows,
  sum_choices,
  weighted_sum,
)
from scattermoe_jax.kernels.contract import (
  IMPLEMENTATIONS,
  Columns,
  Problem,
  accumulator_dtype,
  choose_backend,
  report,
)

__all__ = [
  "IMPLEMENTATIONS",
  "Columns",
  "Problem",
  "accumulator_dtype",
  "choose_backend",
  "current_device",
  "gates_of_rows",
  "report",
  "sum_choices",
  "weighted_sum",
]
