"""Measuring the candidates: all of them, checked first, interleaved, and none that would bring in a dead zone."""

import pytest
import torch

from lofit_kernels import answers, dispatch
from lofit_kernels import autotune as module
from lofit_kernels.answers import Path
from lofit_kernels.autotune import Answer, autotune
from lofit_kernels.dispatch import GEMMS
from lofit_kernels.roofline import Shape

TOY = Shape(T=20, N=24, H=4, D=16, n_scale=1)
ATEN_PASS, ATEN_DELTA = Path("pass", "aten", "vendor"), Path("delta", "aten", "vendor")


def only(answers) -> Answer:
    (answer,) = answers
    return answer


def test_autotune_on_aten():
    answer = only(autotune([TOY], torch.float32, torch.device("cpu"), rounds=2))
    assert answer.case == answers.key(torch.float32, 24, 64, 16, 1, 20)
    assert answer.default == ATEN_PASS
    assert set(answer.seconds) == set(answer.ratios) == {ATEN_PASS, ATEN_DELTA}
    assert answer.ratios[ATEN_PASS] == 1
    assert answer.chosen in answer.seconds
    assert answer.refused == {}
    assert all(seconds > 0 for seconds in answer.seconds.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autotune_tries_no_form_with_a_dead_zone(dtype):
    answer = only(autotune([TOY], dtype, torch.device("cpu"), rounds=1))
    assert answer.default == ATEN_DELTA
    assert set(answer.seconds) == {ATEN_DELTA, ATEN_DELTA._replace(form="dither")}


def test_autotune_tries_every_triton_path(device):
    answer = only(autotune([TOY], torch.float16, device, backends=("aten", "triton"), rounds=1))
    assert answer.refused == {}
    delta = {Path("delta", "triton", gemm) for gemm in GEMMS}
    dither = {Path("dither", "triton", gemm) for gemm in ("vendor", "fused_backward")}
    assert set(answer.seconds) == {ATEN_DELTA, ATEN_DELTA._replace(form="dither")} | delta | dither


class Clock:
    """time.perf_counter by a table: a call of `path` takes seconds[path]; the machine slows down between rounds."""

    def __init__(self, monkeypatch, seconds: dict[Path, float]) -> None:
        self.now, self.seconds, self.order = 0.0, seconds, []
        self.slowness = 1.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(module, "_Inputs", lambda *_: self)

    def check(self, path: Path) -> str | None:
        return None

    def call(self, path: Path):
        def run():
            self.order.append(path)
            self.slowness *= 1.01
            self.now += self.seconds[path] * self.slowness

        return run


@pytest.mark.parametrize(
    ("delta", "chosen"), [(0.5, ATEN_DELTA), (0.96, ATEN_DELTA), (0.99, ATEN_PASS), (2.0, ATEN_PASS)]
)
def test_autotune_leaves_the_default_only_for_a_clear_gain(monkeypatch, delta, chosen):
    clock = Clock(monkeypatch, {ATEN_PASS: 1.0, ATEN_DELTA: delta})
    answer = only(autotune([TOY], torch.float32, torch.device("cpu"), rounds=6))
    assert answer.chosen == chosen
    # a machine that slows down does so for all: the order turns, so the ratio stays
    assert answer.ratios[ATEN_DELTA] == pytest.approx(delta, rel=0.011)
    assert clock.order[2:6] == [ATEN_PASS, ATEN_DELTA, ATEN_DELTA, ATEN_PASS]


@pytest.fixture
def older(monkeypatch):
    """A CUDA device that no Triton kernel serves."""
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(module, "unserved", lambda device: "no Triton tiles for compute capability 7.5")
    monkeypatch.setattr(module, "_wait", lambda device: None)
    return torch.device("cuda", 0)


def test_autotune_on_a_device_without_kernels_is_of_aten(monkeypatch, older):
    Clock(monkeypatch, {ATEN_PASS: 1.0, ATEN_DELTA: 0.5})
    answer = only(autotune([TOY], torch.float32, older, rounds=1))
    assert (answer.default, answer.chosen) == (ATEN_PASS, ATEN_DELTA)
    assert set(answer.seconds) == {ATEN_PASS, ATEN_DELTA}
    with pytest.raises(ValueError, match=r"no Triton tiles for compute capability 7\.5"):
        only(autotune([TOY], torch.float32, older, backends=("triton",), rounds=1))


def test_autotune_compares_with_the_default_of_the_backends_to_try(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(module, "_wait", lambda device: None)
    dither = ATEN_DELTA._replace(form="dither")
    Clock(monkeypatch, {ATEN_DELTA: 1.0, dither: 2.0})
    # where Triton's default is the dither
    answer = only(autotune([TOY], torch.bfloat16, torch.device("cuda", 0), backends=("aten",), rounds=1))
    assert answer.default == answer.chosen == ATEN_DELTA
    assert set(answer.seconds) == {ATEN_DELTA, dither}


def test_autotune_refuses_wrong_numbers(monkeypatch):
    def wrong(*args, form, **options):
        y = right(*args, form=form, **options)
        return y * 1.01 if form == "delta" else y

    right = module.head_affine_linear
    monkeypatch.setattr(module, "head_affine_linear", wrong)
    answer = only(autotune([TOY], torch.float32, torch.device("cpu"), rounds=1))
    assert answer.chosen == ATEN_PASS
    assert set(answer.seconds) == {ATEN_PASS}
    assert "error of y" in answer.refused[ATEN_DELTA]
    assert answer.evidence()["refused"].keys() == {"delta/aten/vendor"}
    # and does not go on where the default is wrong
    with pytest.raises(RuntimeError, match="default path delta/aten/vendor gives wrong numbers"):
        only(autotune([TOY], torch.bfloat16, torch.device("cpu"), rounds=1))


def test_autotune_goes_on_after_a_path_that_fails(monkeypatch):
    def failing(*args, form, **options):
        if form == "delta":
            raise RuntimeError("no kernel image\nmore")
        return right(*args, form=form, **options)

    right = module.head_affine_linear
    monkeypatch.setattr(module, "head_affine_linear", failing)
    answer = only(autotune([TOY], torch.float32, torch.device("cpu"), rounds=1))
    assert answer.refused == {ATEN_DELTA: "RuntimeError: no kernel image"}
    assert answer.chosen == ATEN_PASS


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.bfloat16)])
def test_autotune_measures_the_same_numbers_whatever_the_defaults_are(device, dtype):
    expected, before = module._Inputs(TOY, torch.float32, torch.device("cpu")), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            found = module._Inputs(TOY, torch.float32, torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    for got, right in zip(found.expected + found.eager[2], expected.expected + expected.eager[2], strict=True):
        assert torch.equal(got, right)


def test_autotune_refuses():
    with pytest.raises(ValueError, match="scaled heads"):
        only(autotune([Shape(T=4, N=8, H=2, D=4)], torch.float32, torch.device("cpu")))
    with pytest.raises(ValueError, match="at least 1 round, got 0"):
        only(autotune([TOY], torch.float32, torch.device("cpu"), rounds=0))
    with pytest.raises(ValueError, match="at least one backend, or None .* got none"):
        only(autotune([TOY], torch.float32, torch.device("cpu"), backends=()))
