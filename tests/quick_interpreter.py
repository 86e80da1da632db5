"""Triton's interpreter without work that comes to nothing, for tests: the same results, bit for bit, in less time.

* Before a launch it replaces triton.language's functions by its own, and again before every call of a jit function in a
  kernel, tl.sum and tl.zeros among them, although nothing puts the old ones back in between. Here this is done once.
* It computes whether sums and products of integers overflow, in 64 bits, and drops the answer unless it runs with
  `debug`, which nothing sets. Here this is left out. (64-bit addresses have a test of the IR.)
* It makes the table of numpy's types anew each time that it looks into it. Here it remembers what it found.
"""

from __future__ import annotations

import dataclasses
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


def remembering(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The interpreter's `_get_np_dtype`, looking once for each type of numbers."""
    found: dict[str, Any] = {}

    def quick(kind: Any) -> Any:
        scalar = kind.element_ty if isinstance(kind, tl.block_type) else kind
        # pointers have no name of their own
        if isinstance(scalar, tl.pointer_type):
            return find(kind)
        if scalar.name not in found:
            found[scalar.name] = find(kind)
        return found[scalar.name]

    return quick


def install() -> None:
    """Make every kernel of this process run so, once. What an interpreter does not have is left alone."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None or hasattr(patch, "original"):
        return
    interpreter._patch_lang = once_for_a_launch(patch)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = remembering(interpreter._get_np_dtype)
