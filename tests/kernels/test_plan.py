"""The planner is a table: every row of it, and every refusal."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from lofit_kernels import plan
from lofit_kernels.plan import BACKENDS, FORMS

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

# (has a scale, dtype) -> form
FORM_TABLE = [
    (False, F64, "fold"),
    (False, F32, "fold"),
    (False, F16, "fold"),
    (False, BF16, "fold"),
    (True, F64, "pass"),
    (True, F32, "pass"),
    (True, F16, "delta"),
    (True, BF16, "delta"),
]

# (device, dtype, Triton installed) -> backend
BACKEND_TABLE = [
    ("cpu", F32, True, "aten"),
    ("cpu", BF16, True, "aten"),
    ("cuda", F32, True, "triton"),
    ("cuda", F16, True, "triton"),
    ("cuda", BF16, True, "triton"),
    ("cuda", F64, True, "aten"),
    ("cuda", BF16, False, "aten"),
    ("mps", F16, True, "aten"),
]

REFUSALS = [
    ({"form": "prologue"}, "unknown form 'prologue'.*'fold', 'pass', 'delta'"),
    ({"form": "fold", "has_scale": True}, "'fold' cannot express a scale"),
    ({"backend": "cutlass"}, "unknown backend 'cutlass'.*'aten', 'triton'"),
    ({"backend": "triton", "dtype": F64}, "'triton' computes in .*float64"),
]


def choose(**changes):
    return plan(**{"has_scale": False, "dtype": F32, "device_type": "cpu", **changes})


@pytest.fixture
def triton_installed(monkeypatch):
    # the package exports a function of the module's own name, so the module is reached by its globals
    return lambda present: monkeypatch.setitem(plan.__globals__, "HAS_TRITON", present)


@pytest.mark.parametrize("has_scale, dtype, form", FORM_TABLE)
def test_plan_form(has_scale, dtype, form):
    chosen = choose(has_scale=has_scale, dtype=dtype)
    assert chosen.form == form
    assert chosen.reason


@pytest.mark.parametrize("device_type, dtype, installed, backend", BACKEND_TABLE)
def test_plan_backend(device_type, dtype, installed, backend, triton_installed):
    triton_installed(installed)
    assert choose(device_type=device_type, dtype=dtype).backend == backend


@pytest.mark.parametrize("form", ["pass", "delta"])
@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_plan_takes_the_form_asked_for(form, dtype):
    chosen = choose(has_scale=True, dtype=dtype, form=form)
    assert (chosen.form, chosen.reason) == (form, "asked for")


@pytest.mark.parametrize("form", FORMS)
def test_plan_offset_alone_is_always_a_fold(form):
    assert choose(has_scale=False, form=form).form == "fold"


@pytest.mark.parametrize("backend", BACKENDS)
def test_plan_takes_the_backend_asked_for(backend):
    assert choose(backend=backend).backend == backend


@pytest.mark.parametrize("changes, message", REFUSALS)
def test_plan_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        choose(**changes)


def test_plan_is_frozen():
    with pytest.raises(FrozenInstanceError):
        choose().form = "pass"
