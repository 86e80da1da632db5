"""Every method of the tables as a row: what it is called, how it is fitted, which tasks it needs, what is tuned."""

from __future__ import annotations

from dataclasses import dataclass

START = 4


@dataclass(frozen=True)
class Facts:
    """What a task offers, and how fast it runs: for estimates, on two slow cores with a model of 135 M parameters.

    closed: a closed set of answers. written: answers are written, not chosen. train_rate: examples trained a second.
    judge_rate: questions judged a second. outside: for judging only, from a file of its own in the data folder, or
    from the hub.
    """

    label: str
    train_rate: float
    judge_rate: float
    closed: bool = False
    written: bool = True
    needs_data: bool = True
    outside: bool = False


TASKS: dict[str, Facts] = {
    "clutrr": Facts("CLUTRR", 10.0, 6.5, closed=True),
    "mquake": Facts("MQuAKE", 20.0, 6.5),
    "truthfulqa": Facts("TruthfulQA", 7.0, 12.0, written=False),
    "kinship": Facts("kinship", 20.0, 6.5, closed=True, needs_data=False),
    "triviaqa": Facts("TriviaQA", 20.0, 6.5, outside=True),
    "nq_open": Facts("NQ-open", 20.0, 6.5, outside=True),
    "mmlu": Facts("MMLU", 8.0, 4.0, written=False, outside=True),
}


@dataclass(frozen=True)
class Method:
    """kind: a key of `fitting.FITTING`. needs: fields of `Facts` that must be true of a task; see `applies`.

    tuned: whether its settings are chosen by tuning runs. borrows: methods whose chosen settings it takes instead, each
    its own. learns: from training examples.
    """

    label: str
    kind: str
    needs: tuple[str, ...] = ()
    tuned: bool = False
    learns: bool = True
    borrows: tuple[str, ...] = ()

    @property
    def epochs(self) -> bool:
        """Whether it is trained by gradients, epoch by epoch."""
        return self.kind in ("lofit", "trained", "lofit_scaled", "lofit_on_lora", "lora_on_heads")

    @property
    def chooses(self) -> bool:
        """Whether heads are chosen for it as for LoFiT."""
        return self.kind == "lofit" or "lofit" in self.borrows


METHODS: dict[str, Method] = {
    "zero_shot": Method("0-shot", "base", learns=False),
    "majority": Method("majority answer", "majority", ("written",)),
    "constrained": Method("constrained 0-shot", "constrained", ("closed",), learns=False),
    "five_shot": Method("5-shot", "few_shot"),
    "iti": Method("ITI", "fitted", tuned=True),
    "repe": Method("RepE", "fitted", tuned=True),
    "lofit": Method("LoFiT", "lofit", tuned=True),
    "lora": Method("LoRA", "trained", tuned=True),
    "red": Method("RED", "trained", tuned=True),
    "loreft": Method("LoReFT", "trained", tuned=True),
    "jola": Method("JoLA", "trained", tuned=True),
    "lofit_all": Method("LoFiT, all heads", "trained", tuned=True),
    "lofit_both": Method("LoFiT, all heads, scales kept", "trained", tuned=True),
    "lofit_units": Method("LoFiT, all heads, in units of their spread", "trained", tuned=True),
    "lora_all": Method("LoRA on all linears", "trained", tuned=True),
    "ia3": Method("IA3", "trained", tuned=True),
    "beft": Method("BEFT", "trained", tuned=True),
    "lofit_scaled": Method("LoFiT, scales kept", "lofit_scaled", borrows=("lofit",)),
    "lofit_on_lora": Method("LoFiT on LoRA", "lofit_on_lora", borrows=("lofit", "lora")),
    "lora_on_heads": Method("LoRA in the layers of LoFiT's heads", "lora_on_heads", borrows=("lofit", "lora")),
}
# ours, which are no method of anybody's
VARIANTS = ("lofit_all", "lofit_both", "lofit_units")
# made of LoFiT and LoRA
COMBINED = ("lofit_on_lora", "lora_on_heads")
# the ways to choose heads, ours by the scales of step 1 first
SELECTOR_LABELS = {
    "lofit": "LoFiT: norm of the scales",
    "random": "random",
    "bias_norm": "norm of the offsets",
    "iti_probe": "ITI: probe per head",
    "probing_layers": "probe per layer",
    "saliency": "gradient saliency (ours)",
    "early_stop": "step 1, stopped early (ours)",
}
# the models here are small: a tenth of their heads is as many heads as the paper's 3 % of large ones
LOFIT_DEFAULTS: dict[str, object] = {"top": 0.1}
LOFIT_TUNING: tuple[dict[str, object], ...] = (
    {},
    {"tune_lr": 2e-2},
    {"select_lr": 2e-3, "tune_lr": 2e-2},
    {"top": 0.2},
)


@dataclass(frozen=True)
class Sizes:
    """The sizes at which a method is set beside the others, by the numbers it trains.

    option: of the method, that sets its size; values: what it is set to, other_models: with other models than the
    first. None is the size as it is. default: the value at which the settings are tuned; the cells of that size are the
    main ones. tuned: whether tuning may choose another. says: values in words. share: they are written in percent.
    LoFiT at its largest is a variant, which needs no step 1.
    """

    option: str = ""
    values: tuple[float | None, ...] = (None,)
    other_models: tuple[float, ...] = ()
    default: float | None = None
    tuned: bool = False
    says: str = "{}"
    share: bool = False


_HEADS, _RANK = "{} of the heads", "rank {}"
SIZES: dict[str, Sizes] = {
    "lofit": Sizes("top", (0.01, 0.03, 0.1, 0.3), (0.03, 0.1, 0.3), LOFIT_DEFAULTS["top"], True, _HEADS, True),
    "lofit_scaled": Sizes("top", (0.1,), says=_HEADS, share=True),
    "lora": Sizes("rank", (1, 2, 4, 8), (8,), 8, says=_RANK),
    "lora_all": Sizes("rank", (1, 2, 4, 8), default=8, says=_RANK),
    "loreft": Sizes("rank", (1, 4, 8), default=4, says=_RANK),
    "red": Sizes(),
    "jola": Sizes(),
    "ia3": Sizes(),
    "beft": Sizes(),
}


def applies(method: str, task: str) -> bool:
    """Whether the method makes sense on the task: the majority answer does not where answers are chosen, for one."""
    return all(getattr(TASKS[task], need) for need in METHODS[method].needs)


def grid(method: str) -> tuple[dict[str, object], ...]:
    """The settings with which a search starts, START of them for every method. Raises ValueError for fewer."""
    if method == "lofit":
        settings = LOFIT_TUNING
    else:
        from benchmarks.peers.table import COMPARED

        settings = COMPARED[method].tuning[:START]
    if len(settings) != START:
        raise ValueError(f"{method}: expected {START} settings to try, got {len(settings)}")
    return settings
