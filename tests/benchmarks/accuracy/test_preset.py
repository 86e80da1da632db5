"""Whether a variant has earned a preset: the rule over models, tasks and seeds, and what missing cells leave open."""

from dataclasses import replace

from benchmarks.accuracy.settings import FULL, QUICK
from tests.benchmarks.accuracy.test_findings import answer, rated

NAME = "LoFiT, all heads, scales kept"
RULE = "3 points or more on 2 tasks of smollm2 and gemma3-270m, 2 seeds each."
SETTINGS = replace(
    QUICK, models=("smollm2", "gemma3-270m"), peer_tasks=("clutrr", "mquake", "truthfulqa"), candidate_seeds=2
)


def candidate(rate):
    """LoFiT answers half of the questions, the candidate `rate(cell)` of them."""
    return rated(lambda cell: rate(cell) if cell.method == "lofit_both" else 0.5)


def test_one_that_gains_on_two_tasks_of_every_model_has_earned_it(tmp_path):
    text = answer(tmp_path, "preset", candidate(lambda cell: 0.3 if cell.task == "clutrr" else 0.7), SETTINGS)
    assert text.startswith(f"{NAME} gains {RULE} 6 comparisons: LoFiT is above in 2, below in 4")


def test_a_gain_on_one_model_is_none(tmp_path):
    text = answer(tmp_path, "preset", candidate(lambda cell: 0.7 if cell.model == "smollm2" else 0.5), SETTINGS)
    assert text.startswith(f"{NAME} does not gain {RULE}")


def test_a_gain_on_one_task_is_none(tmp_path):
    text = answer(tmp_path, "preset", candidate(lambda cell: 0.9 if cell.task == "mquake" else 0.5), SETTINGS)
    assert text.startswith(f"{NAME} does not gain {RULE}")


def test_the_gain_is_of_all_seeds(tmp_path):
    text = answer(tmp_path, "preset", candidate(lambda cell: 0.7 if cell.seed == 42 else 0.3), SETTINGS)
    assert text.startswith(f"{NAME} does not gain {RULE}")


def _without(lost, rate):
    def execute(cell):
        if lost(cell):
            raise RuntimeError("no")
        return candidate(rate)(cell)

    return execute


def test_one_seed_that_is_missing_leaves_it_open(tmp_path):
    lost = _without(lambda cell: cell.seed == 43 and cell.task != "truthfulqa", lambda cell: 0.9)
    assert answer(tmp_path, "preset", lost, SETTINGS).startswith(f"{NAME} may still gain {RULE}")


def test_missing_cells_that_cannot_change_it_leave_nothing_open(tmp_path):
    lost = _without(lambda cell: cell.task == "mquake", lambda cell: 0.5)
    assert answer(tmp_path, "preset", lost, SETTINGS).startswith(f"{NAME} does not gain {RULE}")


def test_a_search_that_is_not_over_leaves_it_open(tmp_path):
    settings = replace(SETTINGS, models=("smollm2",), tasks=("clutrr", "mquake"), n_tuning=10)
    whole = candidate(lambda cell: 0.9)
    assert answer(tmp_path, "preset", whole, settings).startswith(f"{NAME} gains")
    last = max(tmp_path.glob("cells/*mquake.lofit_both*tuning*"), key=lambda path: path.stat().st_mtime_ns)
    last.unlink()
    assert answer(tmp_path, "preset", None, settings).startswith(f"{NAME} may still gain")


def test_candidates_are_asked_on_every_model_with_three_seeds():
    assert FULL.candidates == ("lofit_both",) and FULL.candidate_seeds == 3 and len(FULL.models) == 2
