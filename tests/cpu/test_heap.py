"""Free memory goes back to the system or is held in large pages, and what is in use stays as it is."""

import ctypes
import platform
import re
from pathlib import Path

import psutil
import pytest
import torch

from lofit_fast.cpu import heap
from lofit_fast.cpu.heap import held_in_large_pages, release_free_memory
from lofit_fast.training import Engine, prepared
from tests.tiny_models import tokens

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc can give free pages back")
KERNEL = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@glibc
def test_free_memory_is_released():
    pieces = [bytes([i % 256]) * 100_000 for i in range(2000)]
    # what stays in use at the end of the heap keeps malloc from shrinking it by itself
    kept = pieces[-1]
    del pieces
    before = psutil.Process().memory_info().rss
    release_free_memory()
    assert psutil.Process().memory_info().rss < before - 150_000_000
    assert kept == bytes([1999 % 256]) * 100_000


@glibc
def test_held_memory_is_released_afterwards(llama):
    with held_in_large_pages(llama):
        pieces = [bytes([i % 256]) * 100_000 for i in range(2000)]
        before = psutil.Process().memory_info().rss
        del pieces
        release_free_memory()
        assert psutil.Process().memory_info().rss > before - 20_000_000
    assert psutil.Process().memory_info().rss < before - 150_000_000


@glibc
def test_the_heap_is_moved_a_few_times_while_training(llama, monkeypatch):
    moved, passes = [], []
    monkeypatch.setattr(heap, "move_heap", lambda: moved.append(len(passes)))
    with prepared(llama, Engine(large_pages=True)):
        while len(passes) < 40:
            passes.append("training")
            llama.train()(tokens(1, 4))
            llama.eval()(tokens(1, 4))
    assert moved == [2, 8, 32]
    assert not llama._forward_pre_hooks


def test_an_unsettled_engine_leaves_the_heap_alone(llama, monkeypatch):
    monkeypatch.setattr(heap, "set_malloc", lambda options: pytest.fail(f"{options} set"))
    for engine in (Engine(), Engine(large_pages=False)):
        with prepared(llama, engine):
            assert not llama._forward_pre_hooks


@glibc
@pytest.mark.parametrize(
    ("name", "value"), [("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"), ("MALLOC_TRIM_THRESHOLD_", "1000000")]
)
def test_what_the_environment_sets_stays(name, value, llama, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(heap, "set_malloc", lambda options: pytest.fail(f"{options} set"))
    with held_in_large_pages(llama):
        assert not llama._forward_pre_hooks


@pytest.mark.skipif(
    not MODES.is_file() or "[never]" in MODES.read_text() or KERNEL < (6, 1),
    reason="this system cannot collapse pages: it has no transparent huge pages, or Linux before 6.1",
)
def test_what_is_in_use_survives_a_move():
    kept = [torch.full((1000, 100), float(i)) for i in range(100)]
    heap.move_heap()
    assert all((tensor == i).all() for i, tensor in enumerate(kept))
    # the system may list the heap in several parts
    mapped = [part for part in Path("/proc/self/smaps").read_text().split("VmFlags") if "[heap]" in part]
    pages = [line for part in mapped for line in part.splitlines() if line.startswith("AnonHugePages")]
    assert sum(int(line.split()[1]) for line in pages) > 0
