"""What the committed tuning runs chose, read from the cells themselves."""

from pathlib import Path

from benchmarks.accuracy.session import Session
from benchmarks.accuracy.tables import Results
from benchmarks.accuracy.tuning_edges import choices_made

PAPER = Path(__file__).parents[3] / "docs" / "results" / "paper"


def test_no_finished_search_chose_at_an_edge():
    made = Session.read(PAPER)
    found = choices_made(made.slots, Results(made.folder, made.tuning))
    finished = {choice.best.name: choice.edges for choice in found if choice.best is not None and choice.over}
    assert finished
    assert {name: edges for name, edges in finished.items() if edges} == {}
