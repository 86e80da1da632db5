"""Damage done to files in memory, by kind: (content, draw) -> content. What disks, editors and attackers do."""

import json
import math
import struct
from collections.abc import Callable
from random import Random

Mutation = Callable[[bytes, Random], bytes]


def _bit(raw: bytes, draw: Random) -> bytes:
    content = bytearray(raw)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def _zeros(raw: bytes, draw: Random) -> bytes:
    start = draw.randrange(len(raw))
    length = min(len(raw) - start, draw.randrange(1, 40))
    return raw[:start] + bytes(length) + raw[start + length :]


def _again(raw: bytes, draw: Random) -> bytes:
    start = draw.randrange(len(raw))
    return raw[: start + 9] + raw[start:]


BYTES: dict[str, Mutation] = {
    "bit": _bit,
    "zeros": _zeros,
    "again": _again,
    "cut": lambda raw, draw: raw[: draw.randrange(len(raw))],
    "longer": lambda raw, draw: raw + draw.randbytes(draw.randrange(1, 30)),
    "noise": lambda raw, draw: draw.randbytes(draw.choice((1, 8, 300))),
}
_ODD = (
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    math.nan,
    "",
    "..",
    "all",
    [],
    {},
    [[0, 1]],
    [[0, 0]] * 2,
    [[0, True]],
    "\ud800",
)


def _value(raw: bytes, draw: Random) -> bytes:
    content = json.loads(raw)
    content[draw.choice(sorted(content))] = draw.choice(_ODD)
    return json.dumps(content).encode()


def _gone(raw: bytes, draw: Random) -> bytes:
    content = json.loads(raw)
    del content[draw.choice(sorted(content))]
    return json.dumps(content).encode()


def _heads(raw: bytes, draw: Random) -> bytes:
    content = json.loads(raw)
    lists = [name for name in ("scale", "offset", "heads") if isinstance(content.get(name), list)]
    pair = draw.choice(content[draw.choice(lists)])
    pair[draw.randrange(2)] += draw.choice((-1, 1))
    return json.dumps(content).encode()


JSON: dict[str, Mutation] = {
    "value": _value,
    "gone": _gone,
    "other heads": _heads,
    "twice": lambda raw, draw: raw.replace(b"{", b'{"seed": 7, "seed": 8, ', 1),
    "deep": lambda raw, draw: b"[" * 100_000 + raw + b"]" * 100_000,
    "encoding": lambda raw, draw: raw.decode().encode(draw.choice(("utf-16", "utf-32", "utf-8-sig"))),
    "Latin": lambda raw, draw: raw.replace(b"a", b"\xe4", 1),
    "40,000 heads": lambda raw, draw: json.dumps(
        {**json.loads(raw), "offset": [[0, n] for n in range(40_000)], "heads": [[0, n] for n in range(40_000)]}
    ).encode(),
}


def _parts(raw: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def _whole(header: dict, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def _entry(change: Callable[[dict, str, Random], None]) -> Mutation:
    def apply(raw: bytes, draw: Random) -> bytes:
        header, payload = _parts(raw)
        change(header, draw.choice([name for name in header if name != "__metadata__"]), draw)
        return _whole(header, payload)

    return apply


def _other_dtype(header: dict, name: str, draw: Random) -> None:
    # as many bytes, read as other numbers
    dtype, times = draw.choice((("I8", 4), ("BOOL", 4), ("F16", 2), ("BF16", 2), ("I32", 1), ("F8_E4M3", 4)))
    shape = header[name]["shape"]
    header[name].update(dtype=dtype, shape=[*shape[:-1], shape[-1] * times])


def _swapped(header: dict, name: str, draw: Random) -> None:
    other = draw.choice([one for one in header if one != "__metadata__"])
    mine, theirs = header[name]["data_offsets"], header[other]["data_offsets"]
    header[name]["data_offsets"], header[other]["data_offsets"] = theirs, mine


def _number(raw: bytes, draw: Random) -> bytes:
    header, payload = _parts(raw)
    at = 4 * draw.randrange(len(payload) // 4)
    odd = struct.pack("<f", draw.choice((math.nan, math.inf, -math.inf, 3e38, 0.0)))
    return _whole(header, payload[:at] + odd + payload[at + 4 :])


def _without_note(raw: bytes, draw: Random) -> bytes:
    header, payload = _parts(raw)
    return _whole({name: entry for name, entry in header.items() if name != "__metadata__"}, payload)


TENSORS: dict[str, Mutation] = {
    "dtype": _entry(_other_dtype),
    "places swapped": _entry(_swapped),
    "shape": _entry(lambda header, name, draw: header[name]["shape"].reverse()),
    "second name": _entry(lambda header, name, draw: header.update({name.replace("lofit_", ""): header[name]})),
    "other name": _entry(lambda header, name, draw: header.update({draw.choice(("x", "..")): header.pop(name)})),
    "number": _number,
    "no note": lambda raw, draw: _whole(
        {k: v for k, v in _parts(raw)[0].items() if k != "__metadata__"}, _parts(raw)[1]
    ),
    "huge header": lambda raw, draw: draw.choice((0, 2**32, 2**63, 2**64 - 1)).to_bytes(8, "little") + raw[8:],
    "deep header": lambda raw, draw: _whole({}, b"")[:8] + b'{"a":' * 50_000 + b"}" * 50_000,
}
