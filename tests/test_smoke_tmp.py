import jax
import jax.numpy as jnp
import numpy as np
import pytest

import scattermoe_jax as sm
from tests import oracle


def test_smoke():
  with (
    jax.enable_x64(True)
    if hasattr(jax, "enable_x64")
    else jax.experimental.enable_x64()
  ):
    rng = np.random.default_rng(0)
    T, k, E, d, n = 13, 2, 5, 6, 7
    ids = rng.integers(-1, E, (T, k))
    x = rng.normal(size=(T, d))
    w = rng.normal(size=(E, d, 2 * n))
    wo = rng.normal(size=(E, n, d))
    g = rng.normal(size=(T, k))
    bi = rng.normal(size=(E, 2 * n))
    bo = rng.normal(size=(E, d))
    r = sm.route(jnp.asarray(ids), E)
    assert (np.asarray(r.scattered_ids) == oracle.grouped_order(ids, E)).all()
    J = [jnp.asarray(a) for a in (x, g, w, wo, bi, bo)]
    f = lambda x, g, w, wo, bi, bo: sm.smoe_mlp(
      x, g, r, w, wo, bias_in=bi, bias_out=bo
    )
    np.testing.assert_allclose(
      f(*J),
      oracle.smoe_mlp(x, g, ids, w, wo, bias_in=bi, bias_out=bo),
      rtol=1e-12,
    )
    from jax.test_util import check_grads

    check_grads(jax.jit(f), J, 1, modes=["rev"])
    for gi in (0, 1):
      for go in (0, 1):
        xx = jnp.asarray(rng.normal(size=(T * k, d)) if gi else x)
        f2 = lambda x, w, bi: sm.parallel_linear(
          x, w, r, bias=bi, grouped_in=bool(gi), grouped_out=bool(go)
        )
        np.testing.assert_allclose(
          f2(xx, J[2], J[4]),
          oracle.scatter2scatter(
            xx, w, ids, bias=bi, grouped_in=gi, grouped_out=go
          ),
          rtol=1e-12,
          atol=1e-12,
        )
        check_grads(jax.jit(f2), (xx, J[2], J[4]), 1, modes=["rev"])
    jax.vmap(f2)(
      jnp.stack([xx, xx]), jnp.stack([J[2]] * 2), jnp.stack([J[4]] * 2)
    )
    with pytest.raises(NotImplementedError, match="second"):
      jax.grad(lambda x: jax.grad(lambda x: f(x, *J[1:]).sum())(x).sum())(J[0])
