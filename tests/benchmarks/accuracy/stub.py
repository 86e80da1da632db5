"""A session on no model: results made up from the cell itself, the same every time."""

import random

from benchmarks.accuracy.experiments import Available
from benchmarks.accuracy.method_table import METHODS, TASKS
from benchmarks.accuracy.paper_cells import TUNING, Cell
from benchmarks.accuracy.session import Session
from benchmarks.accuracy.settings import QUICK

AVAILABLE = Available({"clutrr": 80, "mquake": 50, "truthfulqa": 40}, {"clutrr": 60, "mquake": 30, "truthfulqa": 20})
ENVIRONMENT = {"device": "CPU, 2 threads", "torch": "2.13.0", "engine": "compiled"}


# what the search ends with: beyond the start grid, before which accuracy rises with the rate, and falls behind it
BEST_RATE = 1.0


def grid(method: str) -> tuple[dict, ...]:
    """Four settings, of which the best is the largest rate."""
    return tuple({"lr": lr} for lr in (0.1, 0.2, 0.4, 0.3))


def made_up(cell: Cell) -> dict:
    """What an Executor would return. A tuning run does the better, the nearer its learning rate is to BEST_RATE."""
    draw = random.Random(cell.name)
    rate = _tuned(dict(cell.options)["lr"]) if cell.split == TUNING else (0.9 if cell.method == "lofit" else 0.2)
    count = cell.n_validation
    hits = [float(i < rate * count) for i in range(count)]
    draw.shuffle(hits)

    def judged(task, hits):
        mean = sum(hits) / len(hits)
        metrics = {"exact_match": mean} if TASKS[task].written else {"mc1": mean, "mc2": mean / 2}
        return {"metrics": metrics, "hits": hits}

    heads = [[draw.randrange(6), n] for n in range(4)] if METHODS[cell.method].chooses else None
    return {
        **judged(cell.task, hits),
        "outside": {task: judged(task, [1.0, 0.0]) for task in cell.outside},
        "n_parameters": 1728 if METHODS[cell.method].epochs else 0,
        "seconds": {"selection": 2.0, "training": 5.0, "judging": 1.0, "cell": 8.0},
        "heads": heads,
        "settings": dict(cell.options),
        "environment": ENVIRONMENT,
        "commit": None,
        "dirty": None,
    }


def _tuned(lr: float) -> float:
    return min(lr, BEST_RATE**2 / lr)


def session(output, settings=QUICK, available=AVAILABLE) -> Session:
    """One that was never run."""
    return Session(output, settings, available, "make paper-quick", of=grid)
