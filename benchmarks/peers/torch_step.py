"""A step of a torch layer, timed as if it were JAX's."""

import jax

from benchmarks.peers import Absent, Step


class End:
  """When the current stream has done all that it was given before."""

  def __init__(self):
    import torch

    self._event = torch.cuda.Event()
    self._event.record()

  def block_until_ready(self):
    """Waits until then."""
    self._event.synchronize()
    return self


class Results:
  """A torch step's results, which `jax.block_until_ready` knows to await.

  The next replay of a graph writes to the same tensors.
  """

  def __init__(self, *tensors):
    self.tensors, self.end = tensors, End()

  def block_until_ready(self):
    """Waits for the results."""
    self.end.block_until_ready()
    return self

  def to_jax(self) -> list[jax.Array]:
    """Returns the results as JAX arrays."""
    self.block_until_ready()
    return [jax.dlpack.from_dlpack(t.contiguous()) for t in self.tensors]


def to_torch(array):
  """Returns the JAX array as a torch tensor on the same GPU, uncopied.

  Raises:
    Absent: if there is no GPU that torch can use.
  """
  import torch

  if not torch.cuda.is_available():
    raise Absent("torch has no GPU here")
  return torch.from_dlpack(jax.block_until_ready(array))


def make_step(
  forward, given, dy, direction: str, *, as_graph: bool = False
) -> Step:
  """Returns a step of `forward()`.

  Python dispatches a jitted step once. A torch program that launches kernel by
  kernel may be bound by its host, which its CUDA graph is not.

  Args:
    forward: returns y.
    given: the tensors whose gradients are wanted, x and the gates first.
    dy: the gradient of y.
    direction: "forward" or "forward+backward".
    as_graph: whether to replay the kernels of a step. One that waits for its
      own results cannot be captured: an error, after which torch is unusable.
  """
  import torch

  for tensor in given:
    tensor.requires_grad_(direction != "forward")

  def step():
    if direction == "forward":
      with torch.no_grad():
        return [forward()]
    y = forward()
    return [y.detach(), *torch.autograd.grad(y, given, dy)]

  def call():
    return Results(*step())

  call().block_until_ready()
  torch.cuda.reset_peak_memory_stats()
  before = torch.cuda.memory_allocated()
  call().block_until_ready()
  peak = torch.cuda.max_memory_allocated() - before
  held = None
  if direction != "forward":
    y = forward()
    held = torch.cuda.memory_allocated() - before - y.nbytes
    del y
  return Step(_replayed(step) if as_graph else call, peak, held)


def _replayed(step):
  """Returns a call that replays the kernels of `step()`, found complete.

  Raises:
    RuntimeError: if they cannot be captured, or not all of them were.
  """
  import torch

  # Warmed up on another stream than the default, as a capture asks.
  stream = torch.cuda.Stream()
  stream.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(stream):
    right = step()
  torch.cuda.synchronize()
  graph = torch.cuda.CUDAGraph()
  # Threads of JAX may allocate meanwhile.
  with torch.cuda.graph(graph, capture_error_mode="thread_local"):
    results = step()

  def replay(_inputs=step):  # What it reads, `step` alone keeps alive.
    graph.replay()
    return Results(*results)

  for tensor in results:
    tensor.zero_()
  replay().block_until_ready()
  for got, expected in zip(results, right, strict=True):
    error = (got - expected).float().norm() / expected.float().norm()
    if not error < 1e-2:
      raise RuntimeError(f"a replay is off by {error:.1e}: kernels are missing")
  return replay
