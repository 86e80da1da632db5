"""Devices and dtypes: by name, and the best of a machine by rule."""

import time

import pytest
import torch

from lofit_fast.models import device as rules
from lofit_fast.models.device import as_dtype, best_device, best_dtype


@pytest.mark.parametrize(
    ("given", "expected"), [("float16", torch.float16), ("float32", torch.float32), (torch.float64, torch.float64)]
)
def test_as_dtype(given, expected):
    assert as_dtype(given) is expected


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "vendor", "expected"),
    [
        (True, True, "GenuineIntel", torch.bfloat16),
        (False, True, "AuthenticAMD", torch.bfloat16),
        # reports the instructions, and takes twice float32's time with them
        (False, True, "GenuineIntel", torch.float32),
        (False, True, "", torch.float32),
        (False, False, "AuthenticAMD", torch.float32),
        (False, False, "", torch.float32),
    ],
)
def test_best_dtype_on_a_cpu_is_a_rule(monkeypatch, amx, avx512_bf16, vendor, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(rules, "vendor", lambda: vendor)
    assert best_dtype(torch.device("cpu")) is expected


def test_best_dtype_asks_no_clock(monkeypatch):
    def asked(*args):
        raise AssertionError("the choice of a dtype took the time of something")

    for clock in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(time, clock, asked)
    assert best_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("native", [True, False])
def test_best_dtype_on_a_gpu(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert best_dtype(torch.device("cuda")) is (torch.bfloat16 if native else torch.float32)


def test_best_dtype_elsewhere():
    assert best_dtype(torch.device("xpu")) is torch.bfloat16
    assert best_dtype(torch.device("mps")) is torch.float32


@pytest.mark.parametrize(("accelerator", "expected"), [("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu"), (None, "cpu")])
def test_best_device(monkeypatch, accelerator, expected):
    found = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    assert best_device().type == expected
