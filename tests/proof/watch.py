"""A memory checker over Triton's interpreter: accesses out of bounds, races between programs, reads that are forbidden,
and addresses that are not as aligned as the compiler is told.

It sees the language's semantics, not compiled code: programs run one after the other, and every load and store that the
interpreter performs is compared with the tensors of the launch. So it finds what a kernel's source does wrong, for the
inputs that ran; what a compiler makes of the source is for the machine-code check and for `make sanitize`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

NOBODY, SEVERAL = -1, -2


class Fault(AssertionError):
    """What a kernel did wrong: its kind ("out of bounds", "race", "forbidden", "promise"), and where."""

    def __init__(self, kind: str, what: str, where: str) -> None:
        super().__init__(f"{kind}: {what} at {where}")
        self.kind = kind
        self.where = where


def _where() -> str:
    """The kernel's line that is being interpreted, its callers after it."""
    lines = []
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if frame.f_code.co_name == "__call__" and path == interpreter.__file__ and lines and "self" in frame.f_locals:
            if isinstance(frame.f_locals["self"], interpreter.GridExecutor):
                break
        elif path not in (interpreter.__file__, __file__) and "/triton/" not in path:
            lines.append(f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)


@dataclass
class Region:
    """One tensor of a launch: `rows` rows of `columns` neighbouring elements, and who touched each of them."""

    start: int
    size: int
    rows: int
    columns: int
    stride: int
    shape: tuple[int, ...]
    forbidden: np.ndarray | None
    writer: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)
    reads: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        n = self.rows * self.columns
        self.writer = np.full(n, NOBODY, np.int32)
        self.reader = np.full(n, NOBODY, np.int32)
        self.reads = np.zeros(n, np.int32)

    def elements(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number of the element at each address, whether there is one)."""
        offset = addresses.astype(np.int64) - self.start
        element = offset // self.size
        row = np.zeros_like(element) if self.rows == 1 else element // self.stride
        column = element - row * self.stride if self.rows > 1 else element
        inside = (offset >= 0) & (offset % self.size == 0)
        inside &= (row >= 0) & (row < self.rows) & (column >= 0) & (column < self.columns)
        return row * self.columns + column, inside


def _region(x: torch.Tensor, forbidden: np.ndarray | None) -> Region:
    shape = tuple(x.shape)
    if x.is_contiguous():
        rows, columns, stride = 1, x.numel(), 0
    elif x.dim() == 2 and (x.stride(1) == 1 or shape[1] == 1):
        # expanded rows are one row
        rows, columns, stride = (shape[0] if x.stride(0) else 1), shape[1], x.stride(0)
    else:
        raise NotImplementedError(f"a tensor of shape {shape} and strides {x.stride()}")
    return Region(x.data_ptr(), x.element_size(), rows, columns, stride, shape, forbidden)


@dataclass
class Launch:
    """A watched launch: its kernel, and what happened to each of its tensors, by parameter name."""

    kernel: str
    regions: dict[str, Region]


class Watch:
    """Watches every launch made inside `with Watch() as watch:`; the first fault is raised from within the launch.

    `launches` lists them; `forbid` names what must not be read. Memory from torch.empty is NaN, so that an element that
    nobody wrote shows in the results.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._forbidden: dict[int, np.ndarray] = {}
        self._reached: list[torch.Tensor] = []
        self._regions: list[Region] = []
        self._undo = contextlib.ExitStack()

    def forbid(self, x: torch.Tensor, columns: torch.Tensor) -> None:
        """Reading these columns of `x` (2-D) is a fault from now on."""
        forbidden = np.zeros(tuple(x.shape), bool)
        forbidden[:, columns.numpy()] = True
        self._forbidden[x.data_ptr()] = forbidden.reshape(-1)

    def reach(self, *tensors: torch.Tensor) -> None:
        """From now on launches may reach these, too: through addresses that they read from a table."""
        self._reached += [x for x in tensors if x.numel()]

    def __enter__(self) -> Watch:
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        self._replace(builder, "create_masked_load", self._load)
        self._replace(builder, "create_masked_store", self._store)
        self._replace(builder, "create_atomic_rmw", self._atomic)
        self._replace(builder, "create_atomic_cas", self._atomic)
        self._replace(executor, "__call__", self._launch)
        self._replace(interpreter.TensorHandle, "set_attr", self._promise)
        empty = torch.empty

        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = empty(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        torch.empty = poisoned
        self._undo.callback(setattr, torch, "empty", empty)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _replace(self, owner: type, name: str, method: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda this, *args, **kwargs: method(original, this, *args, **kwargs))
        self._undo.callback(setattr, owner, name, original)

    def _launch(self, original: Callable[..., None], executor: Any, *args: Any, **kwargs: Any) -> None:
        named = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        tensors = {n: x.base if isinstance(x, TensorDescriptor) else x for n, x in named.items()}
        tensors = {n: x for n, x in tensors.items() if isinstance(x, torch.Tensor) and x.numel()}
        tensors |= {f"reached {number}": x for number, x in enumerate(self._reached)}
        regions: dict[tuple[object, ...], Region] = {}
        found = {}
        for name, x in tensors.items():
            key = (x.data_ptr(), x.dtype, x.shape, x.stride())
            if key not in regions:
                regions[key] = _region(x, self._forbidden.get(x.data_ptr()))
            found[name] = regions[key]
        self._regions = list(regions.values())
        self.launches.append(Launch(executor.fn.__name__, found))
        original(executor, *args, **kwargs)

    def _touched(self, pointers: np.ndarray, mask: np.ndarray, verb: str) -> tuple[Region, np.ndarray] | None:
        addresses, mask = np.broadcast_arrays(np.asarray(pointers), np.asarray(mask, bool))
        addresses = addresses[mask]
        if not addresses.size:
            return None
        best = None
        for region in self._regions:
            numbers, inside = region.elements(addresses)
            if inside.all():
                return region, numbers
            if best is None or inside.sum() > best[0]:
                best = (int(inside.sum()), region)
        where = f"near the tensor of shape {best[1].shape}" if best and best[0] else "of no tensor of the launch"
        raise Fault("out of bounds", f"{addresses.size - (best[0] if best else 0)} elements {verb} {where}", _where())

    def _program(self) -> int:
        x, y, z = interpreter.interpreter_builder.grid_idx
        nx, ny, _ = interpreter.interpreter_builder.grid_dim
        return x + nx * (y + ny * z)

    def _load(self, original: Callable[..., Any], builder: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touched = self._touched(ptrs.data, mask.data, "read")
        if touched is not None:
            region, numbers = touched
            program = self._program()
            if region.forbidden is not None and region.forbidden[numbers].any():
                raise Fault("forbidden", f"elements of {region.shape} read that nothing depends on", _where())
            others = region.writer[numbers]
            if ((others != NOBODY) & (others != program)).any():
                raise Fault("race", f"program {program} reads what program {others.max()} wrote", _where())
            readers = region.reader[numbers]
            region.reader[numbers] = np.where((readers == NOBODY) | (readers == program), program, SEVERAL)
            region.reads[numbers] += 1
        return original(builder, ptrs, mask, *rest, **named)

    def _store(self, original: Callable[..., Any], builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touched = self._touched(ptrs.data, mask.data, "written")
        if touched is not None:
            region, numbers = touched
            program = self._program()
            if np.unique(numbers).size != numbers.size:
                raise Fault("race", f"program {program} writes an element twice in one store", _where())
            for others, what in ((region.writer[numbers], "wrote"), (region.reader[numbers], "read")):
                if ((others != NOBODY) & (others != program)).any():
                    raise Fault("race", f"program {program} writes what another {what}", _where())
            region.writer[numbers] = program
        return original(builder, ptrs, value, mask, *rest)

    def _promise(self, original: Callable[..., None], handle: Any, name: str, value: Any) -> None:
        if name == "tt.divisibility" and (handle.data.astype(np.int64) % np.asarray(value)).any():
            raise Fault("promise", f"{handle.data} said to be divisible by {value}", _where())
        original(handle, name, value)

    def _atomic(self, original: Callable[..., Any], *_: object, **__: object) -> Any:
        raise Fault("race", "an atomic operation: its order is not fixed", _where())


@contextlib.contextmanager
def fault(kind: str) -> Iterator[list[Fault]]:
    """Expects a fault of this kind inside, wherever in the chain of causes; fails when there is none."""
    found: list[Fault] = []
    try:
        yield found
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Fault):
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause.kind != kind:
            raise
        found.append(cause)
    else:
        raise AssertionError(f"no fault was found, expected {kind}")
