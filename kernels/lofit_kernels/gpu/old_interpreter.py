"""Triton 3.6's interpreter with numpy 2.4 or newer, where no loop over a range runs. Imported only where it interprets.

A loop's bound is an array of one element there. Triton 3.6 gives it to `int`, which numpy refuses from 2.4 on; Triton
3.7 squeezes it to no dimensions first. Here 3.6 does the same. Compiled kernels never meet this file.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import interpreter

# the first release whose interpreter squeezes by itself
_MENDED = (3, 7)


def mend() -> None:
    """Make the interpreter of Triton before 3.7 read a loop's bound as 3.7's does; newer ones are left alone."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _MENDED:
        interpreter._patch_lang_tensor = _squeezing(interpreter._patch_lang_tensor)


def _squeezing(patch_tensor: Any) -> Any:
    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return patch
