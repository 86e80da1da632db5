"""What the documentation points at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {path.name: path for path in (ROOT / "kernels" / "lofit_kernels").rglob("*.py")}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

STEPS = re.findall(r"\| `([^`]+)` in `(\w+\.py)` \|", (ROOT / "docs" / "kernels.md").read_text())


@pytest.mark.parametrize("fragment, file", STEPS)
def test_a_step_of_a_kernel_is_where_the_page_says(fragment, file):
    assert fragment in " ".join(SOURCES[file].read_text().split())


def test_every_kernel_file_has_steps():
    assert {"offset.py", "offset_grouped.py", "affine.py", "linear_forward.py", "linear_backward.py"} <= {
        file for _, file in STEPS
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
