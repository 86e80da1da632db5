"""What is chosen on devices that no kernel serves, and on devices that are only imagined."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lofit_kernels import devices, dispatch, fold_offset, fold_offsets, head_affine, head_affine_linear
from lofit_kernels.devices import unserved
from lofit_kernels.dispatch import plan, plan_for, plan_on
from lofit_kernels.gpu import tiles

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one CUDA device of a compute capability, or one AMD device of an architecture."""

    def pretend(capability=None, amd=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        # a torch that was built for CUDA would begin to use the device
        monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "an imagined device")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.version, "hip", amd and "7.0")
        found = SimpleNamespace(gcnArchName=f"{amd}:sramecc+:xnack-")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=None: found)
        monkeypatch.setattr(dispatch, "HAS_TRITON", True)
        forget()

    def forget():
        devices._unserved.cache_clear()
        tiles._accelerator.cache_clear()
        dispatch.forget_plans()

    yield pretend
    monkeypatch.undo()
    forget()


# compute capability or AMD architecture -> whether there are kernels for it
SERVED = {
    (6, 0): False,
    (7, 0): False,
    (7, 5): False,
    (8, 0): True,
    (8, 9): True,
    (9, 0): True,
    (10, 0): True,
    (12, 0): True,
    "gfx908": False,
    "gfx942": True,
    "gfx1100": False,
}


def pretended(gpu, kind) -> None:
    gpu(**({"amd": kind} if isinstance(kind, str) else {"capability": kind}))


@pytest.mark.parametrize("kind", SERVED)
def test_devices_without_kernels_take_aten(gpu, kind):
    pretended(gpu, kind)
    backend = "triton" if SERVED[kind] else "aten"
    with FakeTensorMode():
        weight, scale = torch.empty(64, 64, dtype=BF16, device=CUDA), torch.empty(4, 16, device=CUDA)
        for vectors in (None, scale):
            assert plan_for(8, weight, vectors, "auto", "auto", "auto").backend == backend
    assert plan_on(CUDA, BF16, "auto").backend == backend


@pytest.mark.parametrize("kind", SERVED)
def test_the_tiles_serve_what_is_said_to_be_served(gpu, kind):
    pretended(gpu, kind)
    if SERVED[kind]:
        assert unserved(CUDA) is None
        assert tiles.architecture(CUDA) in tiles.ARCHITECTURES
    else:
        with pytest.raises(ValueError) as raised:
            tiles.architecture(CUDA)
        assert str(raised.value) == unserved(CUDA)


def test_asking_for_triton_on_such_a_device_is_refused(gpu):
    gpu((7, 5))
    with FakeTensorMode():
        weight = torch.empty(64, 64, dtype=BF16, device=CUDA)
        with pytest.raises(ValueError, match=r"no Triton tiles for compute capability 7\.5; expected 8\.0 or newer"):
            plan_for(8, weight, None, "auto", "triton", "auto")
    with pytest.raises(ValueError, match="no Triton tiles"):
        plan_on(CUDA, BF16, "triton")


def test_a_measured_answer_of_triton_is_not_taken_there():
    answer = dispatch.Path("pass", "triton", "vendor")
    case = {"has_scale": True, "dtype": torch.float32, "device_type": "cuda"}
    assert plan(**case, answer=answer).backend == "triton"
    assert plan(**case, answer=answer, refusal="too old").backend == "aten"


def test_every_default_runs_on_a_device_without_kernels(gpu):
    gpu((7, 5))
    with FakeTensorMode():
        z = torch.empty(2, 3, 64, dtype=BF16, device=CUDA)
        weight = torch.empty(64, 64, dtype=BF16, device=CUDA)
        rows, heads = (
            torch.empty(2, 16, device=CUDA),
            torch.empty(2, dtype=torch.int64, device=CUDA),
        )
        folded = fold_offsets([weight] * 2, [rows] * 2, [heads] * 2)[0]
        assert fold_offset(weight, rows, heads).device == CUDA
        assert head_affine(z, scale=rows, scale_heads=heads).shape == z.shape
        for given in (
            {"scale": rows, "scale_heads": heads},
            {"offset": rows, "offset_heads": heads},
            {"folded": folded},
        ):
            y = head_affine_linear(z, weight, **given)
            assert (y.shape, y.device) == (z.shape, CUDA)


def test_nothing_is_asked_of_a_device_that_is_only_imagined(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unserved(CUDA) is None
    assert unserved(torch.device("cpu")) is None


@pytest.mark.parametrize("kwargs", [{"scale": 1}, {"offset": 1}, {"folded": 1}])
def test_tensors_of_two_devices_are_refused_before_a_kernel_reads_them(kwargs):
    with FakeTensorMode():
        z, weight = torch.empty(3, 64, device="cuda:0"), torch.empty(64, 64, device="cuda:0")
        (name,) = kwargs
        given = torch.empty(64, device="cuda:1") if name == "folded" else torch.empty(4, 16, device="cuda:1")
        with pytest.raises(ValueError, match="cuda:0.*cuda:1"):
            head_affine_linear(z, weight, **{name: given})
        with pytest.raises(ValueError, match="on one device, got cuda:0 and cuda:1"):
            head_affine_linear(z, weight.to("cuda:1"), scale=torch.empty(4, 16, device="cuda:0"))


def test_tensors_on_meta_are_computed_as_the_base_computes_them():
    z, weight, rows = (torch.empty(*size, device="meta") for size in ((3, 64), (12, 64), (4, 16)))
    assert head_affine_linear(z, weight, scale=rows).shape == (3, 12)
    assert head_affine_linear(z, weight, offset=rows).shape == (3, 12)
