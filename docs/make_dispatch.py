"""Writes docs/dispatch.md, the table of which backend runs what.

  python docs/make_dispatch.py

The table is what `choose_backend` answers, asked for devices that are only
described; `tests/test_dispatch.py` holds the file to it.
"""

import pathlib
import warnings

from scattermoe_jax._compat import Device
from scattermoe_jax.kernels import IMPLEMENTATIONS, Problem, choose_backend
from scattermoe_jax.kernels.contract import FEW_ROWS_PER_EXPERT, reason_against

PATH = pathlib.Path(__file__).parent / "dispatch.md"

DEVICES = (
  ("CPU", Device("cpu", "cpu")),
  ("T4", Device("gpu", "Tesla T4", (7, 5), 40)),
  ("A100", Device("gpu", "NVIDIA A100", (8, 0), 108)),
  ("L4", Device("gpu", "NVIDIA L4", (8, 9), 58)),
  ("H100, H200", Device("gpu", "NVIDIA H200", (9, 0), 132)),
  ("B200", Device("gpu", "NVIDIA B200", (10, 0), 148)),
  ("RTX PRO 6000", Device("gpu", "NVIDIA RTX PRO 6000", (12, 0), 188)),
)

# (name, S, E, d, n)
SHAPES = (
  ("training", 262144, 128, 4096, 2048),
  ("training, d = 600, n = 100", 262144, 128, 600, 100),
  ("decoding", 64, 128, 4096, 2048),
)
DTYPES = ("bfloat16", "float16", "float32", "float64")

_HEAD = """# Which backend runs what

Made by `python docs/make_dispatch.py` from the code that chooses
(`scattermoe_jax.kernels.choose_backend`); do not edit. For the newest JAX.

Training: S = 262144 rows to E = 128 experts. Decoding: S = 64. Up to
{few} rows per expert `triton` goes before `mosaic`.
`implementation="xla"` (or `"triton"`, `"mosaic"`) in an op or a module, or the
environment variable `SCATTERMOE_JAX_IMPLEMENTATION`, asks for one by name.
`scattermoe_jax.report()` says what would run here, and why.

"""


def table() -> str:
  """Returns the page."""
  header = ["device", "compute capability", "shape", *DTYPES]
  lines = [_line(header), _line(["---"] * len(header))]
  for name, device in DEVICES:
    capability = ".".join(map(str, device.capability or ("none",)))
    answers = {shape: _answers(device, *sizes) for shape, *sizes in SHAPES}
    if len(set(answers.values())) == 1:
      answers = {"any": answers.popitem()[1]}
    for shape, chosen in answers.items():
      lines.append(_line([name, capability, shape, *chosen]))
  lines += ["", "Why not, in the words of each backend's `check`:", ""]
  for name in IMPLEMENTATIONS:
    lines += [f"- {name}: {reason}" for reason in _reasons(name)]
  return _HEAD.format(few=FEW_ROWS_PER_EXPERT) + "\n".join(lines) + "\n"


def _answers(device, num_rows, num_experts, d, n) -> tuple[str, ...]:
  """Returns the backend of each dtype, chosen for both directions."""
  chosen = []
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the warning that `xla` is slow on a GPU
    for dtype in DTYPES:
      problem = Problem(num_rows, num_experts, d, n, dtype, device)
      backward = problem._replace(d_in=n, d_out=d)
      backend = choose_backend([problem, backward])
      chosen.append(backend.__name__.rpartition(".")[2])
  return tuple(chosen)


def _reasons(name) -> list[str]:
  """Returns what a backend says on a CPU, a T4 and an H200, once each."""
  reasons = {}
  for device in (DEVICES[0][1], DEVICES[1][1], DEVICES[4][1]):
    for _, *sizes in SHAPES:
      for dtype in DTYPES:
        problem = Problem(*sizes, dtype, device)
        reasons[reason_against(name, [problem])] = None
  return [reason for reason in reasons if reason]


def _line(cells) -> str:
  return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
  PATH.write_text(table())
