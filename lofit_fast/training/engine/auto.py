"""What "auto" means on this machine: the candidates of which a few steps take least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from lofit_fast.cpu.attention import GROUPED
from lofit_fast.data.encode import Encoded
from lofit_fast.data.pack import collator_of
from lofit_fast.evaluation.choices import packing_refusal
from lofit_fast.training.engine import Engine
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.engine.step_times import Batch, Timings

# a shorter run is over before a probe pays back
FEWEST_STEPS = 40
# seconds of steps below which compiling is not even tried: SmolLM2's layers took 32 and 13 s in step 1 and 2 on two
# cores, once per process, and saved two fifths of the steps' time
LEAST_TO_COMPILE = 120.0
# steps from which a compiled last layer of its own pays: 10 s of compiling, 10 ms a step with SmolLM2
LEAST_TO_NARROW = 1000
# share of a padded batch's tokens that packing must save
LEAST_TO_PACK = 0.05
_ATTENTIONS = {"cpu": (GROUPED, "sdpa")}


def settle(handle: Attachment, engine: Engine, batch: Callable[[Engine], Batch], steps: int) -> tuple[Engine, str]:
    """(engine without a single "auto", a sentence that says what was chosen and why).

    batch: makes what the model is called with under an engine, of typical length; called only for what is "auto".
    steps: how many such steps the run has. The fastest attention is taken; compiling, where the steps to come save more
    time than the compiler takes. Packing is taken with flash attention, and with GROUPED attention where it saves
    tokens: elsewhere one long row costs more attention than padding does. Narrowing is free unless it is compiled, when
    it takes many steps to pay; and the heap is worth moving in a run that is worth compiling.
    The model is as it was afterwards, its vectors' gradients None.
    Raises ValueError where packing with GROUPED attention is asked for a model that would not obey its mask.
    """
    attention = handle.model.config._attn_implementation
    if engine.packing == "auto" and not getattr(handle, "takes_packed_rows", True):
        engine = replace(engine, packing=False)
    why = "as asked"
    if engine.attention == "auto" or engine.compile == "auto":
        engine, why = _probed(handle, engine, batch, steps, attention)
    engine = with_packing(handle.model, replace(engine, attention=_one(engine.attention, attention)), batch)
    compiles = engine.compile is True
    engine = replace(
        engine,
        narrow=_one(engine.narrow, not compiles or steps >= LEAST_TO_NARROW),
        large_pages=_one(engine.large_pages, compiles),
    )
    packed = ", packed" if engine.packing else ""
    compiled = "compiled" if engine.compile else "not compiled"
    return engine, f"engine: {engine.attention} attention{packed}, layers {compiled} ({why})"


def settle_on(
    attachment: Attachment, engine: Engine, rows: Sequence[Encoded], pad: int, batch_size: int, epochs: int
) -> tuple[Engine, str]:
    """`settle` for epochs over encoded examples, on a batch of middling length. pad: the token that fills it up."""
    batch = typical_batch(attachment.model, rows, pad, batch_size)
    return settle(attachment, engine, batch, epochs * math.ceil(len(rows) / batch_size))


def typical_batch(model: nn.Module, rows: Sequence[Encoded], pad: int, batch_size: int) -> Callable[[Engine], Batch]:
    """What makes a batch of middling length under an engine, on the model's device."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    middle = ordered[max(0, (len(ordered) - batch_size) // 2) :][:batch_size]

    def batch(engine: Engine) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        return {key: value.to(device) for key, value in collator_of(engine, pad)(middle).items()}

    return batch


def _one(asked, otherwise):
    return otherwise if asked == "auto" else asked


def with_packing(model: nn.Module, engine: Engine, batch: Callable[[Engine], Batch]) -> Engine:
    """The engine, its attention known, with packing settled. Raises ValueError as `settle` does."""
    refusal = packing_refusal(model, GROUPED) if engine.attention == GROUPED else None
    if engine.packing is True and refusal is not None:
        raise ValueError(f"packing with {GROUPED!r} attention was asked for, but {refusal}")
    if engine.packing != "auto":
        return engine
    if engine.attention != GROUPED or refusal is not None:
        return replace(engine, packing=engine.attention.startswith("flash_attention"))
    padded, packed = (batch(replace(engine, packing=packing))["input_ids"].numel() for packing in (False, True))
    return replace(engine, packing=packed <= (1 - LEAST_TO_PACK) * padded)


def _probed(handle, engine: Engine, batch, steps: int, attention: str) -> tuple[Engine, str]:
    if steps < FEWEST_STEPS:
        return replace(engine, compile=engine.compile is True), f"{steps} steps are too few to probe"
    timings = Timings(handle, batch)
    names = [engine.attention]
    if engine.attention == "auto":
        names = _ATTENTIONS.get(timings.device.type, (attention,))
    if engine.compile is True:
        engine = replace(engine, attention=names[0])
        return engine, "as asked, or the first of its device" if len(names) > 1 else "as asked"
    candidates = [with_packing(handle.model, replace(engine, attention=name, compile=False), batch) for name in names]
    plain = _steps(timings, candidates)
    if timings.refreshed(min(plain, key=plain.get)):
        plain = _steps(timings, candidates)
    best = min(plain, key=plain.get)
    why = ", ".join(f"{one.attention} {seconds:.3g} s" for one, seconds in plain.items()) + " a step"
    # what is known already costs nothing to ask
    compiled = replace(best, compile=True)
    if engine.compile == "auto" and (timings.knows(compiled) or steps * plain[best] > LEAST_TO_COMPILE):
        [measured] = timings.of([compiled])
        why += f", compiled {measured['step']:.3g} s after {measured['first']:.3g} s"
        if steps * (plain[best] - measured["step"]) > measured["first"]:
            best = compiled
    return best, why


def _steps(timings: Timings, candidates: list[Engine]) -> dict[Engine, float]:
    """Seconds a step of each candidate."""
    return {one: timing["step"] for one, timing in zip(candidates, timings.of(candidates), strict=True)}
