"""All peers, each once, by the name that results use. A new peer is a file, a row here, and its equation as a test."""

from functools import partial

from benchmarks.peers import (
    beft,
    floor,
    fold_eager,
    hook,
    ia3,
    iti,
    jola,
    lofit_variants,
    lora,
    loreft,
    original,
    ours,
    red,
    repe,
)
from benchmarks.peers.peer import Peer


def _rates(*rates: float) -> tuple[dict, ...]:
    return tuple({"lr": rate} for rate in rates)


# every peer that is tuned is tuned by the same search
PEERS: dict[str, Peer] = {
    "floor": Peer("frozen floor", attach=floor.attach),
    "ours": Peer("lofit-fast", "ours", attach=ours.attach),
    "hook": Peer("hook LoFiT", "ours", attach=hook.attach),
    "compiled_hook": Peer("hook LoFiT, compiled", "ours", attach=hook.attach_compiled),
    "original": Peer("original per-head loop", "ours", attach=original.attach),
    "fold_eager": Peer("fold in eager PyTorch", "ours", attach=fold_eager.attach),
    "lora": Peer(
        "PEFT LoRA, q and v",
        attach=lora.attach,
        make=lora.make,
        kind="trained",
        lr=1e-3,
        tuning=_rates(3e-4, 1e-3, 3e-3, 1e-2),
    ),
    "lora_all": Peer(
        "PEFT LoRA, all-linear",
        attach=partial(lora.attach, targets="all-linear"),
        make=partial(lora.make, targets="all-linear"),
        kind="trained",
        lr=1e-3,
        tuning=_rates(3e-4, 1e-3, 3e-3, 1e-2),
    ),
    "ia3": Peer(
        "PEFT IA3", attach=ia3.attach, make=ia3.make, kind="trained", lr=1e-2, tuning=_rates(3e-3, 1e-2, 3e-2, 1e-1)
    ),
    "beft": Peer(
        "PEFT BEFT", attach=beft.attach, make=beft.make, kind="trained", lr=1e-2, tuning=_rates(3e-3, 1e-2, 3e-2, 1e-1)
    ),
    "iti": Peer(
        "ITI",
        make=iti.make,
        kind="fitted",
        options={"top": 0.05, "alpha": 5.0},
        tuning=({"alpha": 1.0}, {"alpha": 5.0}, {"alpha": 15.0}, {"alpha": 5.0, "top": 0.15}),
    ),
    "repe": Peer(
        "RepE",
        make=repe.make,
        kind="fitted",
        options={"coefficient": 0.5, "span": (0.25, 0.75)},
        tuning=(
            {"coefficient": 0.25},
            {"coefficient": 0.5},
            {"coefficient": 1.0},
            {"coefficient": 0.5, "span": (0.5, 1.0)},
        ),
    ),
    "red": Peer("RED", make=red.make, kind="trained", lr=5e-3, tuning=_rates(1e-3, 5e-3, 1e-2, 3e-2)),
    "loreft": Peer("LoReFT", make=loreft.make, kind="trained", lr=4e-3, tuning=_rates(1e-3, 4e-3, 1e-2, 3e-2)),
    "jola": Peer("JoLA", make=jola.make, kind="trained", lr=1e-2, tuning=_rates(1e-3, 5e-3, 1e-2, 3e-2)),
    "lofit_all": Peer(
        "LoFiT, all heads", make=lofit_variants.make, kind="trained", lr=1e-2, tuning=_rates(5e-3, 1e-2, 2e-2, 5e-2)
    ),
    "lofit_both": Peer(
        "LoFiT, all heads, scales kept",
        make=partial(lofit_variants.make, scales=True),
        kind="trained",
        lr=1e-2,
        tuning=_rates(5e-3, 1e-2, 2e-2, 5e-2),
    ),
    # one unit is some ten times the usual rate: a rate of 0.1 is a tenth of a head's spread
    "lofit_units": Peer(
        "LoFiT, all heads, in units of their spread",
        make=partial(lofit_variants.make, in_units=True),
        kind="trained",
        lr=1e-1,
        tuning=_rates(2e-2, 5e-2, 1e-1, 3e-1),
    ),
}
# the peers of the step timings, and those of the accuracy tables
TIMED = {name: peer for name, peer in PEERS.items() if peer.attach is not None}
COMPARED = {name: peer for name, peer in PEERS.items() if peer.make is not None}
