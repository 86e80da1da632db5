"""The methods LoFiT is compared with: how each is made, and what of it is tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.peers import iti, jola, lora, loreft, red, repe
from lofit_fast.training.engine.attachment import Attachment


@dataclass(frozen=True)
class Rival:
    """One method.

    kind: "trained" ones are made by `make(model, seed=..., **options)` and then trained; "fitted" ones by
    `make(model, tokenizer, contrasts, seed=..., **options)`, and are done. lr, options: what is taken where nothing is
    tuned; lr is 0 for a fitted one. tuning: settings to choose from on held-out training data, each a dict of what it
    changes: "lr", options, or both.
    """

    kind: Literal["trained", "fitted"]
    make: Callable[..., Attachment]
    lr: float = 0.0
    options: dict = field(default_factory=dict)
    tuning: tuple[dict, ...] = ()


def _rates(*rates: float) -> tuple[dict, ...]:
    return tuple({"lr": rate} for rate in rates)


# a new rival is one row and a file; every one is tuned as often as the others
RIVALS: dict[str, Rival] = {
    "iti": Rival(
        "fitted",
        iti.fit,
        options={"top": 0.05, "alpha": 5.0},
        tuning=({"alpha": 1.0}, {"alpha": 5.0}, {"alpha": 15.0}, {"alpha": 5.0, "top": 0.15}),
    ),
    "repe": Rival(
        "fitted",
        repe.fit,
        options={"coefficient": 0.5, "span": (0.25, 0.75)},
        tuning=(
            {"coefficient": 0.25},
            {"coefficient": 0.5},
            {"coefficient": 1.0},
            {"coefficient": 0.5, "span": (0.5, 1.0)},
        ),
    ),
    "lora": Rival("trained", lora.attach, lr=1e-3, tuning=_rates(3e-4, 1e-3, 3e-3, 1e-2)),
    "red": Rival("trained", red.attach, lr=5e-3, tuning=_rates(1e-3, 5e-3, 1e-2, 3e-2)),
    "loreft": Rival("trained", loreft.attach, lr=4e-3, tuning=_rates(1e-3, 4e-3, 1e-2, 3e-2)),
    "jola": Rival("trained", jola.attach, lr=1e-2, tuning=_rates(1e-3, 5e-3, 1e-2, 3e-2)),
}
