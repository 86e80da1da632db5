"""What the documentation points at is there."""

import re
from pathlib import Path

import pytest

from lofit_fast.config import SELECT

ROOT = Path(__file__).parents[1]
SOURCES = {path.name: path for path in (ROOT / "kernels" / "lofit_kernels").rglob("*.py")}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])

STEPS = re.findall(r"\| `([^`]+)` in `(\w+\.py)` \|", (ROOT / "docs" / "kernels.md").read_text())


@pytest.mark.parametrize("fragment, file", STEPS)
def test_a_step_of_a_kernel_is_where_the_page_says(fragment, file):
    assert fragment in " ".join(SOURCES[file].read_text().split())


def test_functions_named_by_the_kernels_page_exist():
    named = set(re.findall(r"`(_?[a-z]\w*)`", (ROOT / "docs" / "kernels.md").read_text()))
    words = {word for path in SOURCES.values() for word in re.findall(r"\w+", path.read_text())}
    assert len(named) > 10 and sorted(named - words) == []


def test_every_kernel_file_has_steps():
    assert {"offset.py", "offset_grouped.py", "affine.py", "linear_forward.py", "linear_backward.py"} <= {
        file for _, file in STEPS
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


# with a folder in it: a bare name like `state.json` is of a run folder, say
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.-]+/?|Makefile|\w+\.(?:md|toml))`")


def files_named(text: str) -> list[str]:
    """Paths of files and folders in backticks, outside of drawings; those with NAME in them are yet to be written."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [path for path in NAMED.findall(text) if "NAME" not in path]


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_named_by_a_page_exist(page):
    named = files_named((ROOT / page).read_text())
    assert len(named) > 10
    assert sorted({path for path in named if not (ROOT / path).exists()}) == []


def test_the_index_names_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert [page.name for page in pages if page.name != "index.md" and f"({page.name})" not in index] == []


def test_the_guide_says_which_runs_share_step_1():
    (paragraph,) = re.findall(
        r"^\*\*Runs share step 1\*\*.*?\n\n", (ROOT / "docs" / "guide.md").read_text(), re.M | re.S
    )
    shared, alone = paragraph.split("With\n")
    assert set(re.findall(r"`(\w+)`", shared)) == set(SELECT["lofit"])
    # the ways of a training that share less are named
    fewer = {way for way, apart in SELECT.items() if not set(SELECT["lofit"]) <= set(apart)}
    assert set(re.findall(r'`select="(\w+)"`', alone)) == fewer
    assert "last three" in alone and len(SELECT["early_stop"]) == 3
