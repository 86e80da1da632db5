"""Damage to safetensors files: headers that say something else of the same bytes, and other numbers in them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random

from benchmarks.proof.reliability.json_mutations import DEEP

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X99")


def _header_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _with_header(path: Path, header: dict | str, payload: bytes, length: int | None = None) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)


def _changed_header(change: Callable[[dict, str, Random], None]) -> Callable[[Path, Random], None]:
    """A change to the entry of one tensor: (header, its name, draw)."""

    def apply(path: Path, draw: Random) -> None:
        header, payload = _header_of(path)
        change(header, draw.choice([name for name in header if name != "__metadata__"]), draw)
        _with_header(path, header, payload)

    return apply


def _shape(header: dict, name: str, draw: Random) -> None:
    shape = header[name]["shape"]
    odd = ([], [0], [-1, 2], [2**62, 4], [math.prod(shape)], [1, *shape], shape[::-1], [draw.randrange(9)])
    header[name]["shape"] = draw.choice(odd)


def _dtype(header: dict, name: str, draw: Random) -> None:
    header[name]["dtype"] = draw.choice(_DTYPES)


def _dtype_and_shape(header: dict, name: str, draw: Random) -> None:
    # as many bytes, read as other numbers
    header[name]["dtype"], width = draw.choice((("I8", 4), ("BOOL", 4), ("U8", 4), ("F16", 2), ("BF16", 2), ("I32", 1)))
    header[name]["shape"] = [*header[name]["shape"][:-1], header[name]["shape"][-1] * width]


def _one_place(header: dict, name: str, draw: Random) -> None:
    others = [other for other in header if other not in (name, "__metadata__")] or [name]
    header[name]["data_offsets"] = header[draw.choice(others)]["data_offsets"]


def _places_swapped(header: dict, name: str, draw: Random) -> None:
    other = draw.choice([one for one in header if one != "__metadata__"])
    mine, theirs = header[name]["data_offsets"], header[other]["data_offsets"]
    header[name]["data_offsets"], header[other]["data_offsets"] = theirs, mine


def _odd_offsets(header: dict, name: str, draw: Random) -> None:
    header[name]["data_offsets"][draw.randrange(2)] = draw.choice((-1, 0, 1, 2**40, 2**63, 7, None, "0", 1.5))


def _other_name(header: dict, name: str, draw: Random) -> None:
    entry, odd = header.pop(name), ("x", "", f"{name}.0", "../../outside", "layers.9.self_attn.o_proj.offset")
    header[draw.choice(odd)] = entry


def _second_name(header: dict, name: str, draw: Random) -> None:
    header[name.replace("lofit_", "")] = dict(header[name])


def _gone(header: dict, name: str, draw: Random) -> None:
    del header[name]


def _payload_number(path: Path, draw: Random) -> None:
    import numpy

    header, payload = _header_of(path)
    numbers = numpy.frombuffer(payload, dtype=numpy.float32).copy()
    if len(numbers):
        numbers[draw.randrange(len(numbers))] = draw.choice((math.nan, math.inf, -math.inf, 3e38, 1e-40, 0.0))
    _with_header(path, header, numbers.tobytes())


def _payload_bit(path: Path, draw: Random) -> None:
    header, payload = _header_of(path)
    content = bytearray(payload)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    _with_header(path, header, bytes(content))


def _huge_header(path: Path, draw: Random) -> None:
    header, payload = _header_of(path)
    _with_header(path, header, payload, draw.choice((0, 1, 2**32, 2**63 - 1, 2**64 - 1, 100_000_001, 10**6)))


def _deep_header(path: Path, draw: Random) -> None:
    _with_header(path, '{"a":' * DEEP + "1" + "}" * DEEP, b"")


SAFETENSORS: dict[str, Callable[[Path, Random], None]] = {
    "shape": _changed_header(_shape),
    "dtype": _changed_header(_dtype),
    "dtype and shape": _changed_header(_dtype_and_shape),
    "one place": _changed_header(_one_place),
    "places swapped": _changed_header(_places_swapped),
    "odd offsets": _changed_header(_odd_offsets),
    "other name": _changed_header(_other_name),
    "second name": _changed_header(_second_name),
    "tensor gone": _changed_header(_gone),
    "odd number": _payload_number,
    "payload bit": _payload_bit,
    "huge header": _huge_header,
    "deep header": _deep_header,
}
