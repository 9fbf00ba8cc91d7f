"""The attention that every module shares: masks, key-value cache and core."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from scattermoe_jax._compat import current_device
from scattermoe_jax.nn import checks
from scattermoe_jax.ops.checks import check_dtypes

IMPLEMENTATIONS = (None, "cudnn", "xla")

# The widest head of cuDNN's flash attention that every GPU has.
_MAX_CUDNN_HEAD_DIM = 128


class KVCache(NamedTuple):
  """The keys and values of the tokens so far: a value, passed and returned.

  C slots per sequence, filled in order; 2 n d_head elements per token, for n
  heads of keys. A mixture of attention shares its n = h_expert heads among the
  k experts of a token, so its cache is that of grouped-query attention with
  groups of k: k times smaller than multi-head attention's of the same k n
  active heads.

    bytes per token and layer in bfloat16, 32 active heads of 128:
      multi-head attention                         2 x 32 x 128 x 2 = 16384
      grouped-query attention, 8 heads of keys      2 x 8 x 128 x 2 =  4096
      mixture of attention, k = 8, h_expert = 4     2 x 4 x 128 x 2 =  2048

  Attributes:
    key: turned by their positions already.
    value: as projected.
    positions: of each slot's token in its sequence.
    segment_ids: of each slot's token; 0 for padding and for empty slots.
    length: slots written so far. Tokens past C make NaN of all that they see.
  """

  key: Float[Array, "B C n d_head"]
  value: Float[Array, "B C n d_head"]
  positions: Int[Array, "B C"]
  segment_ids: Int[Array, "B C"]
  length: Int[Array, ""]

  @classmethod
  def empty(
    cls,
    batch: int,
    capacity: int,
    num_heads: int,
    head_dim: int,
    *,
    dtype: Dtype = jnp.float32,
  ) -> "KVCache":
    """Returns a cache of `capacity` empty slots for each of `batch` sequences.

    Args:
      batch: B.
      capacity: C.
      num_heads: n, heads of keys; of one expert in a mixture of attention.
      head_dim: d_head.
      dtype: of keys and values.
    """
    checks.check_ints("KVCache.empty", least=0, batch=batch)
    checks.check_ints(
      "KVCache.empty",
      capacity=capacity,
      num_heads=num_heads,
      head_dim=head_dim,
    )
    shape = (batch, capacity, num_heads, head_dim)
    # Each a buffer of its own, so that the cache can be donated.
    slots = (batch, capacity)
    return cls(
      jnp.zeros(shape, dtype),
      jnp.zeros(shape, dtype),
      jnp.zeros(slots, jnp.int32),
      jnp.zeros(slots, jnp.int32),
      jnp.zeros((), jnp.int32),
    )

  def append(
    self,
    key: Float[Array, "B L n d_head"],
    value: Float[Array, "B L n d_head"],
    positions: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
  ) -> "KVCache":
    """Returns the cache with L more slots written, as NaN if past C."""
    length = self.length + jnp.int32(key.shape[1])
    # Not an error: the length is known at run time only.
    fits = length <= self.key.shape[1]
    value = jnp.where(fits, value, jnp.full_like(value, jnp.nan))

    def write(slots, new):
      zero = jnp.zeros_like(self.length)
      start = (zero, self.length) + (zero,) * (slots.ndim - 2)
      return lax.dynamic_update_slice(slots, new.astype(slots.dtype), start)

    return KVCache(
      write(self.key, key),
      write(self.value, value),
      write(self.positions, positions),
      write(self.segment_ids, segment_ids),
      length,
    )


def attend(
  query: Float[Array, "B L N d_head"],
  key: Float[Array, "B M n d_head"],
  value: Float[Array, "B M n d_head"],
  *,
  positions: Int[Array, "B L"] | None = None,
  segment_ids: Int[Array, "B L"] | None = None,
  cache: KVCache | None = None,
  causal: bool = True,
  sliding_window: int | Int[Array, ""] | None = None,
  sinks: Float[Array, " N"] | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "B L N d_head"], KVCache | None]:
  """Returns softmax(scale q k^T + mask) v and the cache with the new slots.

  Query head h reads head h // (N / n) of keys and values, which are not copied.
  A token sees the tokens of its segment, up to itself, within the window.

  Args:
    query: queries, turned by their positions already.
    key: keys, turned as well. M is L, but without `causal`, a cache and
      segments may be another.
    value: values.
    positions: of the tokens in their sequences, for the window when there is a
      cache; None for consecutive ones.
    segment_ids: tokens of different ids don't see each other; none sees id 0,
      padding. All are of one segment if None.
    cache: of the tokens before these; None if these are all.
    causal: whether a token sees only itself and those before it.
    sliding_window: how many tokens a token sees, itself included; causal only.
      An array, as of a scan over layers, needs implementation="xla".
    sinks: a logit per head that takes part in the softmax and has no value
      (gpt-oss).
    scale: of the logits; None for d_head^-0.5.
    implementation: "cudnn" or "xla", as `jax.nn.dot_product_attention` has it;
      None for cuDNN's flash attention on a GPU that has it, else XLA (whose
      backward in bfloat16 needs JAX's standard dtype promotion).

  Returns:
    (B, L, N, d_head) in the dtype of the queries, and the cache (None if none
    was given). What padding tokens get is finite and means nothing.

  Raises:
    NotImplementedError: if cuDNN is asked for, and there is no GPU.
    ValueError: if shapes disagree, the cache has fewer slots than there are
      tokens, a window or a cache comes without `causal`, the implementation is
      none of these, or sinks are given to cuDNN, which has none.
    TypeError: if dtypes disagree, or what should be an array is not one.

  Source: `jax.nn.dot_product_attention`; sinks as transformers' gpt-oss.
  """
  checks.check_one_of(
    "attend", "implementation", implementation, IMPLEMENTATIONS
  )
  if sinks is not None and implementation == "cudnn":
    raise ValueError(
      "attend: implementation='cudnn' has no sinks; use None or 'xla'."
    )
  if implementation == "cudnn" and current_device().platform != "gpu":
    raise NotImplementedError(
      "attend: implementation='cudnn' needs a GPU, this is "
      f"{current_device().kind}; use None or 'xla'."
    )
  checks.check_window("attend", sliding_window)
  is_self = causal or cache is not None or segment_ids is not None
  _check_heads(query, key, value, sinks, is_self)
  # NumPy's float64 is wider than what is computed where x64 is off.
  query, key, value = map(jnp.asarray, (query, key, value))
  checks.check_ids(
    "attend", query.shape[:2], positions=positions, segment_ids=segment_ids
  )
  check_cache("attend", cache, key.shape)
  if not causal and (cache is not None or sliding_window is not None):
    raise ValueError(
      "attend: a cache and a sliding_window need causal=True; what sees "
      "later tokens cannot be decoded."
    )
  if cache is None:
    mask = _segment_mask(segment_ids, segment_ids)
    is_causal, window = causal, sliding_window
  else:
    cache, mask = _append_and_mask(
      cache, key, value, positions, segment_ids, sliding_window
    )
    key, value = (a.astype(query.dtype) for a in (cache.key, cache.value))
    is_causal, window = False, None
  if implementation is None:
    implementation = _choose(query, sinks)
  if sinks is not None or (implementation == "xla" and _fails(query.dtype)):
    mask = _and(
      mask, _causal_mask(query.shape[1], window) if is_causal else None
    )
    y = _attend_plainly(query, key, value, mask, sinks, scale)
  else:
    # It mixes dtypes inside, which a caller's strict setting would refuse.
    with jax.numpy_dtype_promotion("standard"):
      y = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        local_window_size=cast(
          Any, None if window is None else (window - 1, 0)
        ),
        implementation=cast(Any, implementation),
      )
  return y, cache


def consecutive_positions(
  batch: int, length: int, cache: KVCache | None = None
) -> Int[Array, "B L"]:
  """Returns 0 .. length - 1 for each of batch, on from the cache's length."""
  positions = jnp.arange(length, dtype=jnp.int32)
  if cache is not None:
    positions += cache.length
  return jnp.broadcast_to(positions[None, :], (batch, length))


def _choose(query, sinks) -> str:
  """Returns "cudnn" where its flash attention runs, else "xla"."""
  device = current_device()
  runs = (
    sinks is None
    and device.platform == "gpu"
    and device.has_capability(8, 0)
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and query.shape[-1] % 8 == 0
    and query.shape[-1] <= _MAX_CUDNN_HEAD_DIM
    # One query cannot fill a flash kernel's block, and an odd length has no
    # backward with a mask there.
    and query.shape[1] % 2 == 0
  )
  return "cudnn" if runs else "xla"


def _fails(dtype) -> bool:
  """Returns whether JAX's own attention, which has no sinks, fails in XLA.

  In float64 its softmax is in float32, which in older versions (0.7.2) makes
  NaN of a row that sees nothing. In float16 it asks for a product by name that
  a CPU has not.
  """
  on_cpu = current_device().platform == "cpu"
  return dtype == jnp.float64 or (on_cpu and dtype == jnp.float16)


def check_cache(function: str, cache: Any, key_shape: tuple[int, ...]) -> None:
  """Raises unless it is None, or a cache with slots for keys of that shape."""
  if cache is None:
    return
  if not isinstance(cache, KVCache):
    raise TypeError(
      f"{function}: cache must be a KVCache, got a {type(cache).__name__}; "
      "KVCache.empty makes one."
    )
  batch, length, *heads = key_shape
  checks.check_shape(function, "cache.key", cache.key, (batch, "C", *heads))
  checks.check_shape(function, "cache.value", cache.value, cache.key.shape)
  checks.check_shape(function, "cache.length", cache.length, ())
  slots = cache.key.shape[:2]
  for name in ("positions", "segment_ids"):
    checks.check_shape(function, f"cache.{name}", getattr(cache, name), slots)
  if slots[1] < length:
    raise ValueError(
      f"{function}: cache has {slots[1]} slots for each sequence, too few for "
      f"{length} tokens; make it by KVCache.empty of a larger capacity."
    )


def _check_heads(query, key, value, sinks, is_self: bool) -> None:
  """Raises unless they are heads, of the same tokens if attention `is_self`."""
  checks.check_shape("attend", "query", query, ("B", "L", "N", "d_head"))
  batch, length, num_heads, head_dim = query.shape
  keys = (batch, length if is_self else "M", "n", head_dim)
  advice = "other tokens than the queries' need causal=False and no segments"
  checks.check_shape("attend", "key", key, keys, advice)
  checks.check_shape("attend", "value", value, key.shape)
  if not key.shape[2] or num_heads % key.shape[2]:
    raise ValueError(
      f"attend: query has {num_heads} heads, no multiple of the "
      f"{key.shape[2]} of key and value."
    )
  if sinks is not None:
    checks.check_shape("attend", "sinks", sinks, (num_heads,))
  check_dtypes("attend", query, name="query", key=key, value=value)


def _segment_mask(
  query_ids: Int[Array, "B L"] | None, key_ids: Int[Array, "B M"] | None
) -> Bool[Array, "B 1 L M"] | None:
  if query_ids is None or key_ids is None:
    return None
  same = query_ids[:, :, None] == key_ids[:, None, :]
  return (same & (key_ids != 0)[:, None, :])[:, None]


def _append_and_mask(cache, key, value, positions, segment_ids, window):
  """Returns the cache with the new slots, and who sees whom in it."""
  batch, length = key.shape[:2]
  if positions is None:
    positions = consecutive_positions(batch, length, cache)
  if segment_ids is None:
    segment_ids = jnp.ones((batch, length), jnp.int32)
  query_slots = cache.length + jnp.arange(length, dtype=jnp.int32)
  cache = cache.append(key, value, positions, segment_ids)
  # Causal by slot: the order of writing is the order of the sequence, wherever
  # its padding lies.
  key_slots = jnp.arange(cache.key.shape[1], dtype=jnp.int32)
  mask = (key_slots[None, :] <= query_slots[:, None])[None, None]
  mask &= _segment_mask(segment_ids, cache.segment_ids)
  if window is not None:
    distance = positions[:, :, None] - cache.positions[:, None, :]
    mask &= (distance < window)[:, None]
  return cache, mask


def _causal_mask(
  length: int, window: int | Int[Array, ""] | None
) -> Bool[Array, "1 1 L L"]:
  rows = jnp.arange(length, dtype=jnp.int32)
  distance = rows[:, None] - rows[None, :]
  mask = distance >= 0
  if window is not None:
    mask &= distance < window
  return mask[None, None]


def _and(a, b):
  return b if a is None else a if b is None else a & b


def _attend_plainly(query, key, value, mask, sinks, scale):
  """Computes softmax([scale q k^T + mask, sink]) without the sink's column, v.

  Without sinks, None, the softmax has no such column.
  """
  batch, length, num_heads, head_dim = query.shape
  num_kv_heads = key.shape[2]
  wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
  group = num_heads // num_kv_heads
  grouped = query.reshape(batch, length, num_kv_heads, group, head_dim)
  logits = jnp.einsum(
    "blngh,bmnh->bnglm",
    grouped,
    key,
    preferred_element_type=wide,
  ) * (head_dim**-0.5 if scale is None else scale)
  if mask is not None:
    lowest = jnp.full_like(logits, jnp.finfo(wide).min)
    logits = jnp.where(mask[:, :, None], logits, lowest)
  if sinks is not None:
    sink = jnp.broadcast_to(
      sinks.astype(wide).reshape(1, num_kv_heads, -1, 1, 1),
      (*logits.shape[:-1], 1),
    )
    logits = jnp.concatenate([logits, sink], axis=-1)
  probs = jax.nn.softmax(logits, axis=-1)[..., : key.shape[1]]
  y = jnp.einsum(
    "bnglm,bmnh->blngh",
    probs.astype(value.dtype),
    value,
    preferred_element_type=wide,
  )
  return y.reshape(query.shape).astype(query.dtype)
