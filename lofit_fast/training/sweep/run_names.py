"""What a run of a sweep is called: the name of a folder of its own in `runs/`, on every system."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

# of a name, and of its bytes: file systems take 255
LONGEST, MOST_BYTES = 150, 200
# what Windows has instead of files
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
# what is wrong with a name that was given -> whether it is
_WRONG = {
    "it is empty": lambda name: not name.strip(),
    "it holds a separator of folders": lambda name: bool(set(name) & {"/", "\\"}),
    "it holds a sign that cannot be shown": lambda name: not name.isprintable(),
    "it begins or ends with a dot": lambda name: name.strip().startswith(".") or name.strip().endswith("."),
    "it is the name of a device on Windows": lambda name: name.partition(".")[0].strip().casefold() in _RESERVED,
    f"it has more than {LONGEST} signs": lambda name: len(name) > LONGEST,
    f"it has more than {MOST_BYTES} bytes": lambda name: len(name.encode(errors="replace")) > MOST_BYTES,
    "it holds no letter and no digit": lambda name: not _plain(name),
}


def given_name(name: str) -> str:
    """The folder of a run that was given a name: the name, with _ for what is no letter, digit or one of =,.+-

    Raises ValueError for a name that could be another folder than a new one in `runs/`, or none at all.
    """
    reason = next((reason for reason, wrong in _WRONG.items() if wrong(name)), None)
    if reason is not None:
        raise ValueError(f"expected the name of a folder, got {name[:LONGEST]!r}: {reason}")
    return _plain(name)


def name_of(settings: Mapping[str, object]) -> str:
    """A folder's name from what varies: tune_lr=0.01,seed=1; a file of heads stands for itself by its path."""
    name = _plain(",".join(f"{key}={value}" for key, value in settings.items()))[:LONGEST]
    return name.encode()[:MOST_BYTES].decode(errors="ignore").strip("._") or "run"


def same_folder(names: Iterable[str]) -> list[str]:
    """The names that some system would take for another of them, which differ in case or in how they are encoded."""
    folded = Counter(unicodedata.normalize("NFKC", name).casefold() for name in names)
    return sorted(name for name, times in folded.items() if times > 1)


def _plain(name: str) -> str:
    # a letter and its accent are one sign, as most people type them
    return re.sub(r"[^\w.=,+-]+", "_", unicodedata.normalize("NFC", name)).strip("._")
