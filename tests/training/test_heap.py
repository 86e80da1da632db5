"""Free memory goes back to the system, and what is in use stays as it is."""

import ctypes

import psutil
import pytest

from lofit_fast.training.heap import release_free_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc can give free pages back")
def test_free_memory_is_released():
    pieces = [bytes([i % 256]) * 100_000 for i in range(2000)]
    # what stays in use at the end of the heap keeps malloc from shrinking it by itself
    kept = pieces[-1]
    del pieces
    before = psutil.Process().memory_info().rss
    release_free_memory()
    assert psutil.Process().memory_info().rss < before - 150_000_000
    assert kept == bytes([1999 % 256]) * 100_000
