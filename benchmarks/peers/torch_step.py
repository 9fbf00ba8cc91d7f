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
  """A torch step's results, which `jax.block_until_ready` knows to await."""

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


def make_step(forward, given, dy, direction: str, *, note: str = "") -> Step:
  """Returns a step of `forward()`, a CUDA graph if it can be one.

  XLA launches a whole step at once. A torch program that launches kernel by
  kernel may be bound by its host, which a graph is not: it is the peer's best.

  Args:
    forward: returns y.
    given: the tensors whose gradients are wanted, x and the gates first.
    dy: the gradient of y.
    direction: "forward" or "forward+backward".
    note: what a reader of the record should know.
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
  try:
    call, how = _captured(step), "replayed as a CUDA graph"
  except RuntimeError as error:
    how = f"launched by its host, for no CUDA graph takes it: {error}"
    how = how.splitlines()[0]
  return Step(call, peak, held, "; ".join(filter(None, [note, how])))


def _captured(step):
  """Returns a replay of the kernels of `step()`.

  Raises:
    RuntimeError: if they cannot be captured, such as where it waits for them.
  """
  import torch

  # Warmed up on another stream than the default, as a capture asks.
  stream = torch.cuda.Stream()
  stream.wait_stream(torch.cuda.current_stream())
  with torch.cuda.stream(stream):
    step()
  torch.cuda.synchronize()
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph, capture_error_mode="thread_local"):
    results = step()

  def replay():
    graph.replay()
    return Results(*results)

  replay().block_until_ready()
  return replay
