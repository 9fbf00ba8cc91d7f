"""Which backend runs what, what the user may say about it, and what is said."""

import importlib.util
import pathlib
import warnings
from types import SimpleNamespace

import jax
import pytest

from scattermoe_jax import _compat, ops
from scattermoe_jax.kernels import (
  Problem,
  choose_backend,
  contract,
  mosaic,
  report,
  triton,
  xla,
)
from scattermoe_jax.routing import route

CPU = _compat.Device("cpu", "cpu")
T4 = _compat.Device("gpu", "Tesla T4", (7, 5), 40)
A100 = _compat.Device("gpu", "NVIDIA A100", (8, 0), 108)
H200 = _compat.Device("gpu", "NVIDIA H200", (9, 0), 132)
DOCS = pathlib.Path(__file__).parents[1] / "docs"


def problem(device, dtype="bfloat16", num_rows=65536, d_out=1024):
  return Problem(num_rows, 64, 2048, d_out, dtype, device)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
  monkeypatch.delenv(_compat.IMPLEMENTATION_VARIABLE, raising=False)
  contract._warn_once.cache_clear()


@pytest.mark.parametrize(
  "asked, backend",
  [
    (problem(CPU), xla),
    (problem(A100), triton),
    (problem(A100, "float32"), triton),
    (problem(A100, d_out=100), triton),
    (problem(H200, "float32"), triton),
    (problem(H200, d_out=100), triton),
    (problem(H200, num_rows=64), triton),
    (problem(H200, num_rows=2**25), triton),
  ],
)
def test_the_first_that_can_runs(asked, backend):
  assert choose_backend([asked]) is backend


@pytest.mark.parametrize("more, first", [(0, "triton"), (1, "mosaic")])
def test_triton_is_preferred_up_to_few_rows_of_each_expert(more, first):
  few = 64 * contract.FEW_ROWS_PER_EXPERT
  assert contract.preference(problem(H200, num_rows=few + more))[0] == first


def test_hopper_runs_mosaic_where_jax_can():
  if reason := mosaic.check(problem(H200)):
    pytest.skip(reason)
  assert choose_backend([problem(H200)]) is mosaic


def test_one_backend_runs_forward_and_backward():
  backward = problem(A100, "float64")
  with pytest.warns(UserWarning, match="float64"):
    assert choose_backend([problem(A100), backward]) is xla


def test_falling_back_on_a_gpu_warns_once_with_the_reason():
  with pytest.warns(UserWarning, match=r"slow.*7\.5"):
    assert choose_backend([problem(T4)]) is xla
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert choose_backend([problem(T4)]) is xla
    assert choose_backend([problem(CPU)]) is xla


def test_a_name_overrides():
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # who asks for xla needs no warning
    assert choose_backend([problem(A100)], "xla") is xla


def test_the_environment_overrides_and_the_argument_goes_before_it(monkeypatch):
  monkeypatch.setenv(_compat.IMPLEMENTATION_VARIABLE, "xla")
  assert choose_backend([problem(A100)]) is xla
  assert choose_backend([problem(A100)], "triton") is triton


def test_a_misspelt_name_is_told_the_right_one(monkeypatch):
  with pytest.raises(ValueError, match="'tritn'.*did you mean 'triton'"):
    choose_backend([problem(CPU)], "tritn")
  monkeypatch.setenv(_compat.IMPLEMENTATION_VARIABLE, "cuda")
  with pytest.raises(ValueError, match="IMPLEMENTATION=cuda.*mosaic, triton"):
    choose_backend([problem(CPU)])
  monkeypatch.setenv(_compat.IMPLEMENTATION_VARIABLE, "XLA")
  with pytest.raises(ValueError, match="TION=XLA: .*did you mean 'xla'"):
    choose_backend([problem(CPU)])


@pytest.mark.parametrize("given", ["auto", True, 1])
def test_what_is_no_name_is_told_the_names(given, unchecked):
  message = f"implementation={given!r}: not one of mosaic, triton, xla; without"
  with pytest.raises(ValueError, match=message):
    choose_backend([problem(CPU)], given)


def test_a_named_backend_that_cannot_says_why_and_who_can():
  with pytest.raises(
    NotImplementedError, match="implementation='triton' cannot.*cpu.*xla can"
  ):
    choose_backend([problem(CPU)], "triton")


def test_ops_pass_the_name_on():
  ids = jax.numpy.zeros((2, 1), jax.numpy.int32)
  x, w = jax.numpy.ones((2, 4)), jax.numpy.ones((3, 4, 5))
  with pytest.raises(NotImplementedError, match="triton"):
    ops.parallel_linear(x, w, route(ids, 3), implementation="triton")


def test_report_says_what_runs_and_why_not():
  assert report(problem(A100)).splitlines() == [
    "device: NVIDIA A100 (gpu, compute capability 8.0)",
    "product: S = 65536 rows to E = 64 experts, 2048 -> 1024, bfloat16",
    f"mosaic: cannot; {mosaic.check(problem(A100))}",
    "triton: runs",
    "xla: can",
  ]


def test_report_names_the_override(monkeypatch):
  monkeypatch.setenv(_compat.IMPLEMENTATION_VARIABLE, "xla")
  lines = report(problem(A100)).splitlines()
  assert "SCATTERMOE_JAX_IMPLEMENTATION=xla decides" in lines
  assert lines[-2:] == ["triton: can", "xla: runs"]


@pytest.mark.parametrize(
  ("override", "error"), [("XLA", ValueError), ("triton", NotImplementedError)]
)
def test_report_says_that_an_override_fails(monkeypatch, override, error):
  monkeypatch.setenv(_compat.IMPLEMENTATION_VARIABLE, override)
  with pytest.raises(error) as raised:
    choose_backend([problem(CPU)])
  lines = report(problem(CPU)).splitlines()
  assert lines[2] == f"nothing runs: {raised.value}"
  assert lines[-1] == "xla: can"


def test_the_table_in_the_docs_is_what_the_code_answers():
  if reason := mosaic.check(problem(H200)):
    pytest.skip(f"the table is for the newest JAX: {reason}")
  spec = importlib.util.spec_from_file_location(
    "make_dispatch", DOCS / "make_dispatch.py"
  )
  make_dispatch = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(make_dispatch)
  assert (DOCS / "dispatch.md").read_text() == make_dispatch.table(), (
    "run: python docs/make_dispatch.py"
  )


@pytest.mark.parametrize(
  ("written", "capability"),
  [("9.0", (9, 0)), ("8", (8, 0)), ("gfx942", None), (None, None)],
)
def test_the_capability_is_cudas_or_none(monkeypatch, written, capability):
  device = SimpleNamespace(
    platform="gpu", device_kind="a GPU", compute_capability=written
  )
  monkeypatch.setattr(jax, "devices", lambda *_: [device])
  assert _compat.current_device() == _compat.Device("gpu", "a GPU", capability)


def described(monkeypatch, kind, platform="gpu", num_cores=132):
  """Returns the device of a mesh that describes it so."""
  abstract = SimpleNamespace(
    device_kind=kind, platform=platform, num_cores=num_cores
  )
  monkeypatch.setattr(_compat, "_abstract_device", lambda: abstract)
  return _compat.current_device()


def test_a_device_of_a_mesh_that_is_here_is_asked(monkeypatch):
  device = SimpleNamespace(
    platform="gpu", device_kind="a GPU", compute_capability="9.0", core_count=78
  )
  monkeypatch.setattr(jax, "devices", lambda *_: [device])
  here = _compat.Device("gpu", "a GPU", (9, 0), 78)
  assert described(monkeypatch, "a GPU") == here


@pytest.mark.parametrize(
  "kind, capability",
  [
    ("NVIDIA A100-SXM4-80GB", (8, 0)),
    ("NVIDIA RTX A1000", None),
    ("NVIDIA A10G", (8, 6)),
    ("NVIDIA L40S", (8, 9)),
    ("NVIDIA GB200", (10, 0)),
    ("NVIDIA H800", (9, 0)),
    ("NVIDIA H100 80GB HBM3", (9, 0)),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0)),
  ],
)
def test_a_device_that_is_not_here_is_known_by_name(
  monkeypatch, kind, capability
):
  assert described(monkeypatch, kind).capability == capability


@pytest.mark.parametrize("platform", ["tpu", None], ids=str)
def test_a_described_tpu_is_no_gpu(monkeypatch, platform):
  tpu = described(monkeypatch, "TPU v6 lite", platform, num_cores=1)
  assert tpu == _compat.Device("tpu", "TPU v6 lite")
