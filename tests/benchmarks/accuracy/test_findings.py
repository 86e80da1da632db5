"""The answers of the report's sections: they follow from made-up cells, and say nothing of cells that are missing."""

from dataclasses import replace

import pytest

from benchmarks.accuracy import findings
from benchmarks.accuracy.cell_loop import run_cells
from benchmarks.accuracy.paper_report import SECTIONS
from benchmarks.accuracy.settings import QUICK
from benchmarks.accuracy.tables import Results, middle_half
from tests.benchmarks.accuracy.stub import made_up, session

TWO = replace(QUICK, tasks=("mquake",), seeds=(("default", 2),))


def answer(output, name, execute=None, settings=QUICK):
    """A section's answer after its cells were run, or with none of them."""
    section = SECTIONS[name]
    made = session(output, replace(settings, only=section.experiments or (name,)))
    if execute is not None:
        run_cells(made.slots, made.folder, made.tuning, execute, summary=output / "summary.json", progress=False)
    return section.answer(section.of(made.slots), Results(made.folder, made.tuning))


def rated(rate):
    """Cells whose first questions are right. rate: of a cell."""

    def execute(cell):
        hits = [float(i < round(rate(cell) * cell.n_validation)) for i in range(cell.n_validation)]
        metric = "mc1" if cell.task == "truthfulqa" else "exact_match"
        return {**made_up(cell), "hits": hits, "metrics": {metric: sum(hits) / len(hits)}}

    return execute


@pytest.mark.parametrize("name", SECTIONS)
def test_no_answer_is_claimed_from_blanks(tmp_path, name):
    text = answer(tmp_path, name)
    assert text.startswith("Nothing can be said yet")
    assert "%" not in text and "best" not in text


def test_lofit_beside_others(tmp_path):
    text = answer(tmp_path, "table3", rated(lambda cell: {"lora": 0.9, "red": 0.5, "jola": 0.0}.get(cell.method, 0.5)))
    first, _, clutrr, mquake = text.split("\n")
    # of two tasks, each beside four methods
    assert first.startswith("8 comparisons: LoFiT is above in 2, below in 2, and in 4 there is no difference")
    assert clutrr.startswith("* **CLUTRR**: LoFiT has 50.0 % (")
    assert "above JoLA (+50.0" in clutrr and "below LoRA (-39.6" in clutrr and "from RED (+0.0" in clutrr
    assert mquake.startswith("* **MQuAKE**")


def test_other_models_have_lines_of_their_own(tmp_path):
    settings = replace(QUICK, tasks=("mquake",), models=("smollm2", "gemma3-270m"))
    text = answer(tmp_path, "table1", rated(lambda cell: 0.5), settings)
    assert "* **MQuAKE, smollm2**" in text and "* **MQuAKE, gemma3-270m**" in text


def test_own_heads_are_not_compared_with_the_base(tmp_path):
    text = answer(tmp_path, "transfer", rated(lambda cell: 0.9 if cell.selector == "lofit" else 0.1))
    assert "0-shot" not in text
    assert "above random heads (+80.0" in text


def test_ways_to_choose_are_named(tmp_path):
    text = answer(tmp_path, "table2", rated(lambda cell: 0.1 if cell.selector == "bias_norm" else 0.5))
    assert text.startswith("6 comparisons: LoFiT's own choice is above in 1, below in 0, and in 5")
    assert "above norm of the offsets" in text


def test_out_of_domain_a_silent_base_loses_nothing(tmp_path):
    def silent(cell):
        result = made_up(cell)
        for judged in result["outside"].values():
            judged["hits"] = [0.0, 0.0]
        return result

    text = answer(tmp_path / "silent", "table5", silent)
    assert text == (
        "On CLUTRR (0 of 2) and MQuAKE (0 of 2) the base model answers nothing, so a loss could not be seen there."
    )
    assert "**CLUTRR**: LoFiT has 50.0 %" in answer(tmp_path / "loud", "table5", made_up)


def test_more_examples_gain(tmp_path):
    text = answer(tmp_path, "sizes", rated(lambda cell: cell.train_size / 100), TWO)
    assert "* **MQuAKE, LoFiT**: 16.7 % (" in text
    assert " with 16 examples, " in text
    # the two have the same hits at every size
    assert "LoFiT is above in 0, below in 0, and in 3 there is no difference" in text
    assert "LoFiT beside LoRA with 16 (+0.0, +0.0 to +0.0)" in text


def test_one_size_is_no_gain(tmp_path):
    settings = replace(TWO, sizes=(1000,))
    assert "**MQuAKE, LoFiT**: only 50 examples are finished, so nothing is said" in answer(
        tmp_path, "sizes", made_up, settings
    )


def topped(cell):
    share = dict(cell.options).get("top", 0.1)
    return {**rated(lambda _: 0.0 if share < 0.05 else 0.8 + 0.1 * share)(cell), "heads": [[0, 0]] * round(100 * share)}


def test_the_fewest_heads_that_keep_up(tmp_path):
    text = answer(tmp_path, "tops", topped, TWO)
    assert text.startswith("* **MQuAKE**: the most accurate is 30 % (30 heads), 83.3 % (")
    assert "the fewest that keep up are 10 % (10 heads) (-3.3, " in text
    assert "1 % (1 heads) and 3 % (3 heads) are below" in text
    assert text.endswith("so more may do better.")


def test_where_heads_are(tmp_path):
    def placed(cell):
        return {**made_up(cell), "heads": [[layer, 0] for layer in (2, 4, 4, 9)]}

    text = answer(tmp_path, "layers", placed, TWO)
    assert text == (
        "* **MQuAKE**: the middle half of the chosen heads is in layers 4 to 4 (of 2 to 9 that hold any);"
        " choices of two seeds share 1.00 (Jaccard)."
    )
    assert [middle_half(list(range(n))) for n in (1, 2, 4, 8)] == [(0, 0), (0, 1), (1, 2), (2, 5)]


def test_a_failed_cell_is_said(tmp_path):
    def failing(cell):
        return 1 / 0 if cell.method == "lora" else made_up(cell)

    assert "not finished: LoRA" in answer(tmp_path, "table3", failing)
    assert findings.beside_lofit([], None).startswith("Nothing can be said yet")
