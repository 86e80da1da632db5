"""Every family in transformers is right or refused, and docs/support.md says which."""

import re

import pytest
import transformers

from tests.patching import support_table
from tests.patching.support_cells import COLUMNS, QUICK, RIGHT
from tests.patching.support_table import committed, seen, seen_other, simplified
from tests.tiny_families import FAMILY_NAMES
from tests.tiny_others import OTHERS

# one of each kind: dense, transposed weights, latent attention, sinks, shared keys, experts, hybrids, wrappers
SAMPLE = (
    *("bert", "deepseek_v3", "gemma4_text", "gemma4_text shared keys", "gpt2", "gpt_oss", "lfm2", "llava", "opt"),
    *("qwen2_vl", "qwen3_5_text linear last", "qwen3_moe"),
)
# those whose projections have names of their own, or layers of their own kind
UNUSUAL = (
    *("bamba", "bloom", "cpmant", "dbrx", "evolla", "falcon", "gemma4", "git", "gpt_neo", "gpt_neox", "jetmoe"),
    *("kimi_linear", "longcat_flash", "mamba2", "minimax", "mllama", "modernbert-decoder", "moshi", "nemotron_h"),
    *("phi", "qwen3_next", "recurrent_gemma", "reformer", "whisper", "xlm", "xlnet", "zamba", "zamba2"),
)
PAGE = committed()
OF = re.search(r"with transformers ([\d.]+),", support_table.PAGE.read_text())[1]


def check(name: str, cells: dict[str, str], row: str) -> None:
    """Nothing wrong in any release, and in that of the page nothing that it does not say."""
    wrong = {column: cell for column, cell in cells.items() if cell.startswith("WRONG")}
    assert wrong == {}
    # other releases refuse other cells
    if transformers.__version__ == OF:
        assert simplified(cells) == {column: PAGE[row][column] for column in cells}, "run `make support`"


@pytest.mark.parametrize("name", SAMPLE)
def test_a_family_is_right_or_refused(name):
    check(name, seen(name), name)


@pytest.mark.parametrize("name", UNUSUAL)
def test_a_patched_family_equals_the_hook(name):
    check(name, seen(name, QUICK), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILY_NAMES if name not in SAMPLE])
def test_every_family_is_right_or_refused(name):
    check(name, seen(name), name)


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_beyond_decoders_is_right_or_refused(name):
    check(name, seen_other(name), f"other {name}")


def test_the_page_lists_what_is_tried():
    assert set(PAGE) == {*FAMILY_NAMES, *(f"other {name}" for name in OTHERS)}


def test_the_page_shows_what_is_promised():
    decoders = [PAGE[name] for name in FAMILY_NAMES]
    cells = [cell for row in PAGE.values() for cell in row.values()]
    assert all(cell in (RIGHT, "n/a") or cell.startswith("refused: ") for cell in cells)
    assert len(decoders) >= 80
    assert sum(row["patch"] == RIGHT for row in decoders) >= 0.85 * len(decoders)
    assert all(row[column] == RIGHT for row in decoders if row["patch"] == RIGHT for column in ("gradient", "load"))
    assert {*COLUMNS} == {*decoders[0]}
