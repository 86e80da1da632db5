"""Rates and memory: what is counted, and what is left out."""

import mmap

import pytest
import torch

from lofit_fast.training import cost
from lofit_fast.training.cost import peak_memory, rates

MIB = 2**20


def touch(size):
    """Make that much memory resident, and let it go."""
    with mmap.mmap(-1, size) as held:
        for page in range(0, size, mmap.PAGESIZE):
            held[page] = 1


def test_rates():
    assert rates(6, 300, 2.0) == {"tokens_per_s": 150.0, "examples_per_s": 3.0}
    assert rates(6, 300, 0.0) == {"tokens_per_s": 0.0, "examples_per_s": 0.0}


@pytest.mark.skipif(not cost.reset_peak(), reason="this system keeps no peak of memory that can be reset")
def test_peak_memory_is_that_of_the_scope():
    # 128 MiB before it and 64 MiB inside it, both gone at its end; mapped, since malloc may keep what it was given back
    touch(128 * MIB)
    with peak_memory("cpu") as memory:
        touch(64 * MIB)
    assert memory.peak_bytes == pytest.approx(64 * MIB, abs=4 * MIB)


@pytest.mark.skipif(not cost.reset_peak(), reason="this system keeps no peak of memory that can be reset")
def test_peak_memory_counts_what_malloc_had_kept():
    def blocks():
        # small enough for the heap; the last one keeps its end where it is
        return [bytearray(64 * 1024) for _ in range(1024)], bytearray(64 * 1024)

    held, last = blocks()
    del held
    with peak_memory("cpu") as memory:
        again = blocks()
    assert memory.peak_bytes == pytest.approx(64 * MIB, abs=8 * MIB)
    assert len(last) == len(again[1])


def test_unknown_memory_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    with peak_memory("cpu") as memory:
        pass
    assert memory.peak_bytes is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_peak_memory_on_a_gpu_is_the_allocators():
    held = torch.ones(32 * MIB, dtype=torch.uint8, device="cuda")
    with peak_memory("cuda") as memory:
        torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    assert memory.peak_bytes == 64 * MIB
    assert len(held)
