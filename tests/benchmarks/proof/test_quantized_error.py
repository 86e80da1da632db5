"""What docs/frozen_products.md says products in 8 bits do is what the committed file says, over all linears."""

import json
from pathlib import Path

from tests.markdown_tables import cells_of

DOCS = Path(__file__).parents[3] / "docs"


def test_the_pages_tables_are_the_files():
    found = json.loads((DOCS / "results" / "quantized_error.json").read_text())
    text = (DOCS / "frozen_products.md").read_text().partition("## What it costs in accuracy")[2]
    shown = [row[1:] for row in cells_of(text)[1:]]
    ways = found["linears"].values()
    expected = [
        [f"{way[of][n]:.1%}".replace("%", " %") for of in ("y", "dz") for n in ("median", "largest")] for way in ways
    ]
    assert sorted(shown) == sorted(expected)
    cosines = {row[0]: row[1:] for row in cells_of(text[text.index("| scales") :])}
    for name, of in found["gradient_cosine"].items():
        assert cosines[f"{name}s"] == [f"{value:.3f}" for value in of.values()]
