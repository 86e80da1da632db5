"""Tables of Markdown pages."""

import re


def cells_of(text: str) -> list[list[str]]:
    """The first table of a Markdown text: a list of cells per row, the header first, without the rule below it."""
    table = re.search(r"(?:^\|.*\n?)+", text, re.MULTILINE).group()
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    return [row for row in rows if not all(set(cell) <= set("-:") and cell for cell in row)]
