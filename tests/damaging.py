"""What befalls a file: bits, cuts, other bytes, another encoding, another value, depth. The same draws every time."""

import json
import random

# what stands in place of a value of JSON or TOML
VALUES = (None, True, -1, 0, 10**40, 1e400, -1e400, float("nan"), "", "\0", "../x", "\ud83d", [], {}, [[]], {"a": {}})
# what comes in between
BYTES = (b"\0", b"\xff\xfe", b'"', b"[", b"\n", b"9" * 5000, b"\xed\xa0\xbd")
DEEP = 10**5


def _flip(content, draw):
    at = draw.randrange(8 * len(content))
    return content[: at // 8] + bytes([content[at // 8] ^ 1 << at % 8]) + content[at // 8 + 1 :]


def _cut(content, draw):
    return content[: draw.randrange(len(content))]


def _lose(content, draw):
    first, last = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:first] + content[last:]


def _zeros(content, draw):
    first = draw.randrange(len(content))
    return content[:first] + bytes(min(16, len(content) - first)) + content[first + 16 :]


def _insert(content, draw):
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.choice(BYTES) + content[at:]


def _twice(content, draw):
    return content + content


def _utf16(content, draw):
    return content.decode(errors="replace").encode("utf-16")


def _deep(content, draw):
    return draw.choice([b"[", b'{"a":', b"a = ["]) * DEEP


WAYS = (_flip, _flip, _flip, _cut, _lose, _zeros, _insert, _insert, _twice, _utf16, _deep)


def damaged(content, count, seed=0):
    """So many damaged contents of a file."""
    draw = random.Random(seed)
    return [draw.choice(WAYS)(content, draw) for _ in range(count)]


def revalued(content, count, seed=0):
    """A JSON object so many times, each with another value in one place."""
    draw = random.Random(seed)
    for _ in range(count):
        copy = json.loads(json.dumps(content))
        place = copy
        while True:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.3:
                break
            place = place[key]
        place[key] = draw.choice(VALUES)
        yield copy
