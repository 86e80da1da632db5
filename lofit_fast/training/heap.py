"""Memory that was freed and that malloc still holds."""

import ctypes
import os


def release_free_memory() -> None:
    """Give the free pages of the C heap back to the system, with glibc; elsewhere nothing happens.

    Tensors of batches of many lengths leave holes that the next batch does not fit. Costs some hundredths of a second,
    and as much again when the pages are next used: for once per epoch, not for once per step.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
