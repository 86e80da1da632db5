"""What of Triton's interpreter stops our kernels, mended. Compiled kernels never meet this file.

* Before 3.7 with numpy 2.4 or newer, no loop over a range runs. A loop's bound is an array of one element. Triton 3.6
  gives it to `int`, which numpy refuses; Triton 3.7 squeezes it to no dimensions first. Here 3.6 does the same.
* A compared number keeps the type of what was compared: spread over a block, it is an array of integers. As a mask,
  Triton 3.9 refuses it, where older ones take it. Here it is an array of booleans, which is what the compiler makes.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

# the first release whose interpreter squeezes by itself
_SQUEEZES = (3, 7)


def mend() -> None:
    """Mend what this release does not do by itself. A second call changes nothing."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _SQUEEZES and not hasattr(interpreter._patch_lang_tensor, "__wrapped__"):
        interpreter._patch_lang_tensor = _squeezing(interpreter._patch_lang_tensor)
    builder = interpreter.InterpreterBuilder
    if not spreads_booleans():
        builder.create_splat = _of_booleans(builder.create_splat)


def spreads_booleans() -> bool:
    """Whether a comparison of two numbers, spread over a block, gives booleans."""
    builder = interpreter.interpreter_builder
    number = interpreter.TensorHandle(np.zeros(1, np.int32), tl.int32)
    compared = builder.create_icmpEQ(number, number)
    return bool(builder.create_splat(tl.block_type(tl.int1, [2]), compared).data.dtype == np.bool_)


def _squeezing(patch_tensor: Any) -> Any:
    @wraps(patch_tensor)
    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return patch


def _of_booleans(create_splat: Any) -> Any:
    @wraps(create_splat)
    def spread(self: Any, block: Any, value: Any) -> Any:
        if value.data.dtype == np.bool_:
            value = interpreter.TensorHandle(value.data, tl.int1)
        return create_splat(self, block, value)

    return spread
