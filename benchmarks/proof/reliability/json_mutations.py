"""Damage to JSON and TOML at what it means: values, keys, depth, encodings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

# values that stand where something else is expected
ODD: tuple[object, ...] = (
    *(None, True, False, -1, 0, 1, 2, 10**12, 2**63, -(2**63), 1e308, math.nan, math.inf, -math.inf, 0.5),
    *("", "..", "../../outside", "/etc/passwd", "all", "\x00", "\ud800", "a" * 5000, [], {}, [[]], [[0, 0]] * 2),
    *([[0]], [[0, 1, 2]], [[-1, 0]], [[0, 1e9]], [["0", "1"]], {"a": {}}, [None], "float32", "1e400"),
)
# of TOML: the same in its own words
_ODD_WORDS = (
    *("-1", "0", "1e400", "nan", "inf", "-inf", "true", '""', '".."', '"../../outside"', '"/etc"', "[]", "{}", "[[]]"),
    *("99999999999999999999", "0x", '"' + "a" * 5000 + '"', "[" * 2000 + "]" * 2000, "1979-05-27", "'", '"\\u0000"'),
)
DEEP = 100_000


def _places(content: object, at: tuple = ()) -> Iterator[tuple]:
    """The way to every value in a JSON value."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*at, key)
        yield from _places(value, (*at, key))


def _changed_json(change: Callable[[object, object, Random], None]) -> Callable[[Path, Random], None]:
    """A change to what holds one of the values: (what holds it, its key, draw)."""

    def apply(path: Path, draw: Random) -> None:
        # of several lines, one of them
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        at = draw.randrange(len(lines))
        content = json.loads(lines[at])
        places = list(_places(content))
        if places:
            *way, key = draw.choice(places)
            holder = content
            for step in way:
                holder = holder[step]
            change(holder, key, draw)
        lines[at] = json.dumps(content)
        path.write_text("\n".join(lines) + "\n", errors="surrogatepass")

    return apply


def _set(holder, key, draw: Random) -> None:
    holder[key] = draw.choice(ODD)


def _drop(holder, key, draw: Random) -> None:
    del holder[key]


def _rename(holder, key, draw: Random) -> None:
    value = holder[key]
    if isinstance(holder, dict):
        del holder[key]
        holder[draw.choice(("", "x", f"{key} ", f"{key}s"))] = value
    else:
        holder.insert(key, value)


def _nearby(holder, key, draw: Random) -> None:
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int | float):
        holder[key] = value + draw.choice((-1, 1))
    elif isinstance(value, str):
        holder[key] = value[:-1] + chr(32 + draw.randrange(90))
    elif isinstance(value, list):
        draw.shuffle(value)


def _many(holder, key, draw: Random) -> None:
    holder[key] = [[0, number] for number in range(40_000)]


def _deep(path: Path, draw: Random) -> None:
    text = path.read_text().strip() or "{}"
    around = draw.choice((("[", "]"), ('{"a":', "}")))
    path.write_text(f"{around[0] * DEEP}{text}{around[1] * DEEP}")


def _deep_value(path: Path, draw: Random) -> None:
    text = path.read_text()
    path.write_text(re.sub(r":\s*[^,{}\[\]]+", lambda found: ": " + "[" * DEEP + "]" * DEEP, text, count=1))


def _other_encoding(path: Path, draw: Random) -> None:
    text, encoding = path.read_text(), draw.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le"))
    path.write_bytes(text.encode(encoding))


def _latin(path: Path, draw: Random) -> None:
    content = path.read_bytes()
    at = draw.randrange(len(content))
    path.write_bytes(content[:at] + b"\xe9\xff" + content[at:])


def _key_twice(path: Path, draw: Random) -> None:
    text = path.read_text()
    pairs = re.findall(r'"[^"]*":\s*[^,{}\[\]\n]+', text)
    if pairs:
        name = draw.choice(pairs).partition(":")[0]
        path.write_text(text.replace("{", "{" + f"{name}: {json.dumps(draw.choice(ODD[:13]))}, ", 1))


def _other_top(path: Path, draw: Random) -> None:
    path.write_text(json.dumps(draw.choice(ODD[:-12])))


JSON: dict[str, Callable[[Path, Random], None]] = {
    "odd value": _changed_json(_set),
    "near value": _changed_json(_nearby),
    "key gone": _changed_json(_drop),
    "other key": _changed_json(_rename),
    "40,000 heads": _changed_json(_many),
    "deep": _deep,
    "deep value": _deep_value,
    "encoding": _other_encoding,
    "Latin": _latin,
    "key twice": _key_twice,
    "other top": _other_top,
}


def _odd_word(path: Path, draw: Random) -> None:
    words = list(re.finditer(r'(?<==)\s*("[^"\n]*"|[\w.+-]+|\[[^\]\n]*\])', path.read_text()))
    word = draw.choice(words)
    text = path.read_text()
    path.write_text(text[: word.start()] + " " + draw.choice(_ODD_WORDS) + text[word.end() :])


def _odd_name(path: Path, draw: Random) -> None:
    name = draw.choice(("..", "../x", "a/b", "/abs", ".", "", "con", "a" * 300, "..\\x", "x\x00y", "~", "state.json"))
    path.write_text(path.read_text().replace('name = "', f'name = "{name}', 1))


TOML: dict[str, Callable[[Path, Random], None]] = {
    "odd word": _odd_word,
    "odd name": _odd_name,
    "encoding": _other_encoding,
    "Latin": _latin,
}
