"""Settings of the methods that are made of others: what tuning has chosen for those."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.accuracy.method_table import METHODS
from benchmarks.accuracy.paper_cells import Cell, as_options
from benchmarks.accuracy.tuning import Tuning


class BorrowedTuning(Tuning):
    """`Tuning` in which a method that borrows has the settings chosen for the methods it borrows from.

    It has no runs of its own. It waits for theirs, which their own cells, earlier in the plan, ask for.
    """

    def settled(self, cell: Cell, so_far: bool = False) -> Cell | None:
        """As `Tuning.settled`; for a method that borrows None while a run of one it borrows from is missing."""
        options: dict[str, object] = {}
        for method in METHODS[cell.method].borrows:
            lender = super().settled(replace(cell, method=method, options=()), so_far)
            if lender is None:
                return None
            options |= dict(lender.options)
        if options:
            return replace(cell, options=as_options({**options, **dict(cell.options)}))
        return super().settled(cell, so_far)
