"""The C heap of a training on a CPU: given back where an epoch begins, or held in large pages.

Linux hands out memory in pages of 4 KiB unless asked, and glibc gives the end of its heap back whenever enough of it is
free, to ask for it again in the next step. Both cost most in a virtual machine, where a page that is new, or that the
processor's page cache has lost, takes two walks through tables. Elsewhere than on Linux with glibc nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

# malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# the largest that glibc takes; larger blocks are mapped by themselves
_LARGEST_BLOCK = 2**25
# what glibc itself arrives at once a block of the largest size was freed
_USUAL = {_MMAP_THRESHOLD: _LARGEST_BLOCK, _TRIM_THRESHOLD: 2 * _LARGEST_BLOCK}
_HOLDING = {_MMAP_THRESHOLD: _LARGEST_BLOCK, _TRIM_THRESHOLD: 2**31 - 1}
# mallopt(3): the older names of what GLIBC_TUNABLES sets
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
# asm-generic/mman-common.h; Linux 6.1
_MADV_COLLAPSE = 25
_PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")

# training passes before which the heap is moved: it has most of its size after the first step, and all of it later
_MOVES = (2, 8, 32)

_held = False


def release_free_memory() -> None:
    """Give the free pages of the heap back to the system, unless they are held.

    Tensors of batches of many lengths leave holes that the next batch does not fit. Costs some hundredths of a second,
    and as much again when the pages are next used: for once per epoch, not for once per step.
    """
    if not _held:
        _call("malloc_trim", 0)


@contextmanager
def held_in_large_pages(model: nn.Module) -> Iterator[None]:
    """A scope in which malloc keeps what is freed, and from the model's second training pass on in large pages.

    Moving it takes a second or two per GB, once. Holes become pages too: the process grows by some percent. It is the
    whole process's heap; of nested scopes the outermost counts. Where the environment sets malloc's options, glibc goes
    by them, and nothing is done here.
    Afterwards what is free is given back, and malloc does as it usually does.
    """
    global _held
    if _held or not _has_glibc() or _set_outside():
        yield
        return
    passes = 0

    def moved(module: nn.Module, args: tuple) -> None:
        nonlocal passes
        passes += module.training
        if module.training and passes in _MOVES:
            move_heap()

    hook = model.register_forward_pre_hook(moved)
    _held = True
    set_malloc(_HOLDING)
    try:
        yield
    finally:
        hook.remove()
        _held = False
        set_malloc(_USUAL)
        release_free_memory()


def move_heap() -> None:
    """Put the heap into large pages as far as the system has them. A kernel that knows none goes on as it is."""
    size = int(_PAGE_SIZE.read_text()) if _PAGE_SIZE.is_file() else 0
    for start, end in _heap() if size else ():
        start, end = -(-start // size) * size, end // size * size
        if start < end:
            _call("madvise", ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_COLLAPSE)


def _heap() -> Iterator[tuple[int, int]]:
    """The addresses between which the heap is."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            yield tuple(int(address, 16) for address in line.split()[0].split("-"))


def set_malloc(options: dict[int, int]) -> None:
    """glibc's mallopt for each option (malloc.h) and its value."""
    for option, value in options.items():
        _call("mallopt", option, value)


def _set_outside() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(name in os.environ for name in _VARIABLES)


def _has_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def _call(name: str, *arguments) -> None:
    """A function of the C library, where it has that."""
    function = getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
    if function is not None:
        function(*arguments)
