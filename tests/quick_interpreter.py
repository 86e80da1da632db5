"""Triton's interpreter without its repeated work, for tests: the same operations on the same numbers, in less time.

It replaces triton.language's functions by its own before a launch, and again before every call of a jit function inside
a kernel, tl.sum and tl.zeros among them, although nothing puts the old ones back in between. To find them it lists the
members of four namespaces each time, which takes longer than what the kernel does. Here this is done once for a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _NothingDone:
    """What undoes a replacement that was not made."""

    def restore(self) -> None:
        pass


def once_for_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The interpreter's `_patch_lang`, doing nothing where the namespaces that a function sees are replaced already."""
    done: set[tuple[bool, bool]] = set()

    def quick(fn: Any) -> Any:
        values = {id(value) for value in fn.__globals__.values()}
        seen = (id(tl) in values, id(tl.core) in values)
        if seen in done:
            return _NothingDone()
        scope = patch(fn)
        done.add(seen)
        restore = scope.restore

        def restored() -> None:
            # the end of a launch: only its own replacement is undone, and the next one makes all of them again
            done.clear()
            restore()

        scope.restore = restored
        return scope

    quick.original = patch
    return quick


def install() -> None:
    """Make every kernel of this process run so, once. Interpreters without such a function are left alone."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is not None and not hasattr(patch, "original"):
        interpreter._patch_lang = once_for_a_launch(patch)
