"""The support table of docs/support.md: made from what is seen of the tiny families, and read back.

`python -m tests.patching.support_table [NAME ...]` writes the page, and `tests/patching/test_support.py` holds it to
what is seen.
"""

import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.patching.support_cells import COLUMNS, OTHER_COLUMNS, RIGHT, family_of, other_of, see
from tests.tiny_families import FAMILY_NAMES
from tests.tiny_others import OTHERS

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
Rows = Mapping[str, Mapping[str, str]]
_KINDS = (("", FAMILY_NAMES), ("other ", tuple(OTHERS)))

_HEADER = """# Supported models

Written by `make support` with transformers {version}, from tiny models of random weights. Each cell is a test:

| column | what is compared |
|---|---|
| patch | logits with scales and offsets on every head, against a plain hook; `unpatch` restores every bit |
| gradient | gradients of scales and offsets, against autograd through the hook |
| generate | greedy tokens with the model's own cache, against the hook, also with folded offsets |
| packed | two samples in one row told apart by their positions, against each alone |
| narrowed | logits and gradients when the last layer's MLP sees labelled rows only |
| load | the adapter folder, saved and loaded: the same bits |
| merge | `handle.merge()` in memory, scales and offsets |
| export | `lf.export` and `lf.verify_export`, with offsets |
| classify | an untrained classifier and the vectors, trained together for a few steps |

**yes**: right. **no [n]**: refused, before anything is changed, for the reason in the list below. **-**: not
applicable. A model that is not listed is found by the names of its modules (`lofit_fast/patching/families.py`), or
refused. Of models with several towers, the language model is patched; of an encoder and a decoder, the decoder's
self-attention; of a classifier without a decoder, its encoder.

"""


def page(families: Rows, others: Rows) -> str:
    """The whole page."""
    import transformers

    reasons: dict[str, int] = {}
    tables = "\n".join(
        f"## {title}\n\n{said}\n\n{_table(rows, columns, reasons)}"
        for title, rows, columns, said in (
            ("Decoders", families, COLUMNS, _summary(families)),
            ("Others", others, OTHER_COLUMNS, "A classifier's head is frozen by `lf.patch`: see the guide."),
        )
    )
    listed = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    return _HEADER.format(version=transformers.__version__) + tables + f"\n## Reasons\n\n{listed}\n"


def _summary(rows: Rows) -> str:
    patched, exported = (sum(cells[column] == RIGHT for cells in rows.values()) for column in ("patch", "export"))
    return f"{len(rows)} families and variants: {patched} patched, {exported} exported with offsets and scales."


def _table(rows: Rows, columns, reasons: dict[str, int]) -> str:
    lines = [f"| model_type, variant | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(_written(cells[column], reasons) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def _written(cell: str, reasons: dict[str, int]) -> str:
    if cell == RIGHT:
        return "yes"
    kind, _, reason = cell.partition(": ")
    if kind == "n/a":
        return "-"
    return f"{'no' if kind == 'refused' else kind} [{reasons.setdefault(reason, len(reasons) + 1)}]"


def simplified(cells: Mapping[str, str]) -> dict[str, str]:
    """Cells as the page has them: why something is not applicable is not on it."""
    return {column: "n/a" if cell.startswith("n/a") else cell for column, cell in cells.items()}


def committed() -> dict[str, dict[str, str]]:
    """The cells on the page, by the family's name; "other <name>" for those of the second table."""
    text = PAGE.read_text()
    body, _, listed = text.partition("\n## Reasons\n")
    reasons = dict(re.findall(r"^(\d+)\. (.+)$", listed, re.MULTILINE))
    rows = {}
    for part, columns, prefix in zip(
        re.split(r"\n## (?:Decoders|Others)\n", body)[1:], (COLUMNS, OTHER_COLUMNS), ("", "other "), strict=True
    ):
        for line in part.splitlines():
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            if len(cells) == len(columns) and name not in ("---", "model_type, variant"):
                rows[prefix + name] = dict(zip(columns, (_read(cell, reasons) for cell in cells), strict=True))
    return rows


def _read(cell: str, reasons: Mapping[str, str]) -> str:
    if match := re.fullmatch(r"no \[(\d+)\]", cell):
        return f"refused: {reasons[match[1]]}"
    return {"yes": RIGHT, "-": "n/a"}.get(cell, cell)


def seen(name: str, columns=COLUMNS) -> dict[str, str]:
    """What is seen of a family now."""
    with tempfile.TemporaryDirectory() as folder:
        return see(family_of(name, Path(folder)), columns)


def seen_other(name: str) -> dict[str, str]:
    """What is seen of a model beyond decoders now."""
    with tempfile.TemporaryDirectory() as folder:
        return see(other_of(name, Path(folder)), OTHER_COLUMNS)


def main(names: list[str]) -> None:
    """Look at these families, or at all, and write the page; the others stay as they are on it."""
    rows = committed() if names else {}
    for name in names or [*FAMILY_NAMES, *(f"other {name}" for name in OTHERS)]:
        other = name.removeprefix("other ")
        rows[name] = seen(name) if other == name else seen_other(other)
        print(name, *(f"{column}: {cell}" for column, cell in rows[name].items() if cell != RIGHT), sep="\n    ")
        sys.stdout.flush()
    PAGE.write_text(page(*({name: rows[prefix + name] for name in kind} for prefix, kind in _KINDS)))


if __name__ == "__main__":
    main(sys.argv[1:])
