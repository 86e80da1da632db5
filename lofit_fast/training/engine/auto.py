"""What "auto" means: rules on the device, the model and the amount of work. No clock is asked.

Attention and compiled layers change the last bits of a result. So they are chosen by rules that give the same answer in
every process, and the answer goes into the run folder.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from lofit_fast.data.collate import Batch, on_device
from lofit_fast.data.encode import Encoded
from lofit_fast.data.pack import GROUPED
from lofit_fast.evaluation.choices import length_refusal
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.patching.placement import device_of
from lofit_fast.training.engine import Engine, collator_of
from lofit_fast.training.engine.attachment import Attachment
from lofit_fast.training.engine.attention_choice import FLASH, attention_refusal, best_attention, check_head_counts
from lofit_fast.training.engine.cpu_extras import pays_to_prepack, prepacking_refusal
from lofit_fast.training.engine.frozen_products import settled_products
from lofit_fast.training.engine.last_layer import narrowing_refusal
from lofit_fast.training.engine.packing_trial import packing_leak, packs

# floating-point operations of a stage from which compiled layers pay on a CPU: SmolLM2's took 13 to 32 s to compile,
# once per process, and two minutes of its steps were 5e13 operations on the slower of two processors
COMPILE_FROM = 5e13
# steps from which a compiled last layer of its own pays: 10 s of compiling, 10 ms a step with SmolLM2
NARROW_FROM = 1000
# share of a padded batch's tokens that packing must save
LEAST_TO_PACK = 0.05
# for prompts' keys and values, in 10^9 bytes: SmolLM2-135M's of 300 stories take 1.3, an 8B model's 4
PROMPT_CACHE_GB = 16.0
_COMPILERS = ("g++", "clang++", "c++")


def settle(
    attachment: Attachment, engine: Engine, rows: Sequence[Encoded], pad: int, batch_size: int, epochs: int
) -> tuple[Engine, str]:
    """The engine without a single "auto", and a sentence that says what was chosen.

    Args:
        attachment: what is in the model. One with `takes_packed_rows = False` is not packed unless that is asked for.
        engine: what was asked for.
        rows: the examples of an epoch.
        pad: the token id that fills a batch.
        batch_size: examples per optimizer step.
        epochs: how often the examples are seen.

    The rules. Attention: `attention_choice.CANDIDATES`. Compiled layers:
    on a CPU that has a C++ compiler, from `COMPILE_FROM` operations on; elsewhere when asked for. Packing: with flash
    attention, and with GROUPED attention where it leaves out `LEAST_TO_PACK` of a batch's tokens; elsewhere one long
    row costs more attention than padding does. Narrowing: where nothing is compiled for it, or in a long run. Large
    pages: with compiled layers. Prepacked weights: where prompts are kept, and
    `cpu.prepacked_weights.pays_to_prepack`. Products with frozen weights: `frozen_products.settled_products`.
    A prefix cache needs to know what is read, as `prefix_cache.worth` does: here "auto" is none.
    Attention, packing and narrowing are tried on a few tokens, the first two with the attachment disabled: what does
    not give the results of the model's own attention, and of examples apart and whole, is not chosen.

    Raises:
        ValueError: an attention is asked for that the model cannot run with, packing of a model that would mix
            examples, narrowing that would change results, or products that are not to be had; or the model's numbers of
            heads fit no attention.
    """
    model = attachment.model
    device = device_of(model)
    check_head_counts(model)
    engine = with_prompts(attachment, engine)
    few_rows = engine.prompt_cache_gb > 0
    products = settled_products(model, engine.frozen_products, few_rows=few_rows)
    engine = replace(engine, frozen_products=products)
    if engine.packing == "auto" and not getattr(attachment, "takes_packed_rows", True):
        engine = replace(engine, packing=False)
    with attachment.disabled():
        engine = with_attention(model, engine, device, typical_batch(model, rows, pad, batch_size))
    tokens = epochs * sum(len(row["input_ids"]) for row in rows)
    steps = epochs * math.ceil(len(rows) / batch_size)
    engine = replace(engine, compile=_one(engine.compile, pays_to_compile(model, device, tokens)))
    pays = not engine.compile or steps >= NARROW_FROM
    refusal = narrowing_refusal(model) if engine.narrow is True or (engine.narrow == "auto" and pays) else None
    if engine.narrow is True and refusal is not None:
        raise ValueError(f"narrow=True was asked for, but {refusal}: use narrow=False")
    if engine.prepack is True and (reason := prepacking_refusal(model)):
        raise ValueError(f"prepack=True was asked for, but {reason}: use prepack=False")
    engine = replace(
        engine,
        narrow=_one(engine.narrow, pays and refusal is None),
        prepack=engine.prepack is True or (engine.prepack == "auto" and few_rows and pays_to_prepack(model)),
        large_pages=_one(engine.large_pages, engine.compile and device.type == "cpu"),
        prefix_cache_gb=_one(engine.prefix_cache_gb, 0.0),
    )
    return engine, said(engine)


def with_prompts(attachment: Attachment, engine: Engine) -> Engine:
    """The engine with its prompt cache settled. Raises ValueError for one that nothing would use, or beside compile.

    Layers that go on from kept prompts are not compiled: each reads a cache of its own and would need its own graph.
    """
    alone = getattr(getattr(attachment, "config", None), "positions", "all") == "answer"
    if not alone:
        if engine.prompt_cache_gb not in ("auto", 0):
            raise ValueError(
                f"prompt_cache_gb={engine.prompt_cache_gb} was asked for, but these vectors act on prompts too, whose "
                "keys and values change with every step: expected 'auto' or 0, or positions='answer'"
            )
        return replace(engine, prompt_cache_gb=0.0)
    engine = replace(engine, prompt_cache_gb=_one(engine.prompt_cache_gb, PROMPT_CACHE_GB))
    if engine.prompt_cache_gb and engine.compile is True:
        raise ValueError(
            "compile=True was asked for, but layers that go on from kept prompts are not compiled: use compile=False, "
            "or prompt_cache_gb=0 to take whole sequences through compiled layers"
        )
    return replace(engine, compile=False) if engine.prompt_cache_gb else engine


def with_attention(model: nn.Module, engine: Engine, device: torch.device, batch: Callable[[Engine], Batch]) -> Engine:
    """The engine with attention and packing settled. Raises ValueError as `settle` does."""
    if engine.attention != "auto":
        if refusal := attention_refusal(model, engine.attention):
            raise ValueError(refusal)
        return with_packing(model, engine, batch)
    packs = engine.packing is not False
    settled = with_packing(model, replace(engine, attention=best_attention(model, device, packs=packs)), batch)
    if settled.attention == FLASH and not settled.packing:
        unpacked = replace(engine, packing=False, attention=best_attention(model, device, packs=False))
        return with_packing(model, unpacked, batch)
    return settled


def said(engine: Engine) -> str:
    """A settled engine in a sentence."""
    packed = ", packed" if engine.packing else ""
    layers = "compiled" if engine.compile else "not compiled"
    products = "" if engine.frozen_products == "full" else f", frozen products in {engine.frozen_products}"
    weights = ", weights prepacked" if engine.prepack else ""
    prefix = f", prefix cache of up to {engine.prefix_cache_gb:.3g} GB" if engine.prefix_cache_gb else ""
    return f"engine: {engine.attention} attention{packed}, layers {layers}{products}{weights}{prefix}"


def pays_to_compile(model: nn.Module, device: torch.device, tokens: int) -> bool:
    """Whether so many tokens, forward and backward to the input, are worth what compiling the layers takes.

    A product with frozen weights takes 2 operations per weight and token forward, and 2 backward.
    """
    if device.type != "cpu" or not has_compiler():
        return False
    weights = sum(parameter.numel() for layer in decoder_layers(model) for parameter in layer.parameters())
    return 4 * weights * tokens >= COMPILE_FROM


def has_compiler() -> bool:
    """Whether there is a C++ compiler, without which torch.compile makes nothing for a CPU."""
    return any(map(shutil.which, _COMPILERS))


def typical_batch(model: nn.Module, rows: Sequence[Encoded], pad: int, batch_size: int) -> Callable[[Engine], Batch]:
    """What makes a batch of middling length under an engine, on the model's device."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    middle = ordered[max(0, (len(ordered) - batch_size) // 2) :][:batch_size]

    def batch(engine: Engine) -> Batch:
        return on_device(collator_of(engine, pad)(middle), device_of(model))

    return batch


def with_packing(model: nn.Module, engine: Engine, batch: Callable[[Engine], Batch]) -> Engine:
    """The engine, its attention known, with packing settled. Raises ValueError as `settle` does."""
    if engine.packing == "auto" and not packs(engine.attention):
        return replace(engine, packing=False)
    if engine.packing == "auto" and engine.attention == GROUPED:
        padded, packed = (batch(replace(engine, packing=packing))["input_ids"].numel() for packing in (False, True))
        if packed > (1 - LEAST_TO_PACK) * padded:
            return replace(engine, packing=False)
    if engine.packing is False:
        return engine
    refusal = _packing_refusal(model, engine)
    if engine.packing is True and refusal is not None:
        raise ValueError(f"packing with {engine.attention!r} attention was asked for, but {refusal}: use packing=False")
    return replace(engine, packing=refusal is None)


def _packing_refusal(model: nn.Module, engine: Engine) -> str | None:
    if engine.attention == GROUPED and (reason := length_refusal(model)):
        return reason
    return packing_leak(model, engine.attention, lambda packing: collator_of(replace(engine, packing=packing), 0))


def _one(asked, otherwise):
    return otherwise if asked == "auto" else asked
