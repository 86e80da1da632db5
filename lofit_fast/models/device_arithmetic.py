"""What a training step keeps on each of several devices and sends between them, by mode, before anything is loaded.

Every number says what it is. An exact count is made on the model itself, on the meta device. A formula is written down
here, with its source, and a test holds it to a count on tiny models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import nn

from lofit_fast.models.meta_counts import (
    Decoder,
    Lowest,
    Saved,
    Weights,
    attention_of,
    meta_model,
    saved_for_backward,
    shard_of,
    weights_of,
)
from lofit_fast.models.tensor_cuts import cut, sent_per_token
from lofit_fast.patching.architectures import find_projections

COUNT, FORMULA = "exact count", "formula"
# of a float32 number that AdamW trains: itself, its gradient, two moments
_TRAINED = 16
NOT_COUNTED = (
    "Not counted: the device's own context, what the allocator cannot use, gradients of activations while they are "
    "passed on, buffers of collectives. No GPU has run this."
)


@dataclass(frozen=True)
class Item:
    """One number of bytes. what: in words; evidence: `COUNT` or `FORMULA`."""

    what: str
    bytes: int
    evidence: str = FORMULA


@dataclass(frozen=True)
class DevicePlan:
    """Of the fullest device: what it keeps, and per step what collectives are given (payload) and it sends itself."""

    memory: tuple[Item, ...]
    payload: tuple[Item, ...]
    sent: int
    notes: tuple[str, ...] = field(default=())

    @property
    def total(self) -> int:
        """All that is kept."""
        return sum(item.bytes for item in self.memory)


def ring_all_reduce(payload: int, n: int) -> int:
    """Bytes that each of n processes sends to sum `payload` bytes over a ring: 2 (n - 1) / n of them.

    Source: Patarasuk and Yuan 2009, bandwidth optimal all-reduce; NCCL's performance notes have the same factor.
    """
    return round(2 * (n - 1) / n * payload)


def ring_all_gather(payload: int, n: int) -> int:
    """Bytes that each of n processes sends so that all have the `payload` of all: (n - 1) / n of it."""
    return round((n - 1) / n * payload)


def vector_bytes(numbers: int) -> int:
    """What the vectors take in training: float32 numbers, their gradients, AdamW's two moments."""
    return _TRAINED * numbers


def gradient_payload(numbers: int) -> int:
    """What data parallel training sums per step: the float32 gradients of the vectors."""
    return 4 * numbers


def logit_bytes(labelled: int, vocabulary: int, itemsize: int) -> int:
    """Logits of the labelled tokens in the model's dtype, and what cross entropy keeps of them in float32."""
    return labelled * vocabulary * (itemsize + 4)


def fsdp_payload(shards: Weights, lowest: int, n: int) -> tuple[int, int]:
    """(forward, backward) bytes that FSDP2 gathers in a step, whole: the padded shards times n.

    shards: of one device. lowest: the lowest layer with vectors. Source: each decoder layer is a group, and what is
    outside of them another; torch gathers each once forward. It gathers each layer again in backward, and keeps the
    outer group. Below the vectors no backward is needed; one layer below is gathered all the same, since torch asks
    for the next before it knows. Frozen weights have no gradients to scatter.
    """
    forward = n * (sum(shards.layers) + shards.outside)
    return forward, n * sum(shards.layers[max(lowest - 1, 0) :])


def fsdp_gathered(weights: Weights) -> int:
    """Weights that are whole on a device at once: two layers, one computing and one arriving, and the outer group."""
    return sum(sorted(weights.layers)[-2:]) + weights.outside


def stages_of(weights: Weights, head: int, n: int) -> list[range]:
    """Which layers each of n devices has where they are dealt in order, by bytes, the output head on the last."""
    front = weights.outside - head
    ends, total = list(accumulate(weights.layers, initial=front))[1:], weights.total
    stages, begin = [], 0
    for device in range(1, n + 1):
        end = sum(place <= device * total / n for place in ends) if device < n else len(ends)
        stages.append(range(begin, max(begin, end)))
        begin = max(begin, end)
    return stages


def plan_devices(
    name: str, mode: str, devices: int, tokens: int, dtype: torch.dtype, n_scale: Sequence[int], n_offset: Sequence[int]
) -> DevicePlan:
    """What one training step takes on each of several devices.

    name: as `meta_model` takes it. tokens: of a forward pass on a device that has data of its own (ddp, fsdp), or of
    the one that all work on (tp, device-map); all labelled. n_scale, n_offset: vectors by projection.
    Raises ValueError for an unknown mode, a model that cannot be cut so, and what `meta_model` raises.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: expected one of {', '.join(MODES)}")
    if devices < 1:
        raise ValueError(f"expected at least one device, got {devices}")
    model = meta_model(name, dtype)
    counts = [scaled + shifted for scaled, shifted in zip(n_scale, n_offset, strict=True)]
    numbers = sum(p.head_dim * count for p, count in zip(find_projections(model), counts, strict=True))
    decoder = Decoder.of(model)
    scaled = any(n_scale) and n_scale[next(i for i, count in enumerate(counts) if count)] > 0
    step = _Step(decoder, devices, tokens, dtype, numbers, decoder.lowest(counts), scaled)
    planned = MODES[mode](step)
    if (packed := getattr(model.config, "quantization_config", None)) is None:
        return planned
    kind = packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", None)
    note = f"The weights are quantized ({getattr(kind, 'value', kind)}), and counted as if they were {dtype}."
    return replace(planned, notes=(note, *planned.notes))


@dataclass(frozen=True)
class _Step:
    decoder: Decoder
    n: int
    tokens: int
    dtype: torch.dtype
    numbers: int
    lowest: Lowest
    scaled: bool

    @property
    def model(self) -> nn.Module:
        return self.decoder.model

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    @property
    def tied(self) -> bool:
        return self.head.weight is self.model.get_input_embeddings().weight

    @property
    def trained(self) -> Item:
        return Item("vectors, their gradients and AdamW's moments", vector_bytes(self.numbers))

    @property
    def summed(self) -> Item:
        return Item("gradients of the vectors, summed", gradient_payload(self.numbers))

    def logits(self) -> Item:
        size = logit_bytes(self.tokens, self.head.weight.shape[0], self.dtype.itemsize)
        return Item("logits, were every token labelled and none in chunks", size)

    def saved(self) -> tuple[Saved | None, tuple[str, ...]]:
        own = attention_of(self.model)
        notes = () if own is None else (f"attention is counted as {own!r} computes it: the family takes no other",)
        try:
            return saved_for_backward(self.decoder, self.tokens, self.lowest, self.scaled), notes
        except ValueError as error:
            return None, (f"activations are not counted: {error}",)


_KEPT = "activations kept for backward"


def _activations(saved: int | None) -> tuple[Item, ...]:
    return () if saved is None else (Item(_KEPT, saved, COUNT),)


def _ddp(step: _Step) -> DevicePlan:
    saved, notes = step.saved()
    weights = Item("weights, whole", weights_of(step.decoder).total, COUNT)
    memory = (weights, step.trained, *_activations(saved and saved.total), step.logits())
    return DevicePlan(memory, (step.summed,), ring_all_reduce(step.summed.bytes, step.n), notes)


def _fsdp(step: _Step) -> DevicePlan:
    saved, notes = step.saved()
    weights, shards = weights_of(step.decoder), shard_of(step.decoder, step.n)
    forward, backward = fsdp_payload(shards, step.lowest.index, step.n)
    memory = (
        Item(f"weights, a shard of {step.n}", shards.total, COUNT),
        Item("weights, whole while they are computed with", fsdp_gathered(weights) * (step.n > 1)),
        step.trained,
        *_activations(saved and saved.total),
        step.logits(),
    )
    payload = (Item("weights, gathered forward", forward), Item("weights, gathered backward", backward), step.summed)
    sent = ring_all_gather(forward + backward, step.n) + ring_all_reduce(step.summed.bytes, step.n)
    return DevicePlan(memory, payload, sent, notes)


def _tp(step: _Step) -> DevicePlan:
    per_token = sent_per_token(step.decoder, step.lowest, step.n)
    logits = step.logits()
    cut(step.model, step.n)
    saved, notes = step.saved()
    weights = Item(f"weights, cut in {step.n}", weights_of(step.decoder).total, COUNT)
    size = step.tokens * step.dtype.itemsize
    payload = (
        Item("activations, summed forward", per_token.forward * size),
        Item("gradients of activations, summed backward", per_token.backward * size),
        Item("logits, gathered", per_token.gathered * size),
        step.summed,
    )
    sent = ring_all_gather(payload[2].bytes, step.n)
    sent += sum(ring_all_reduce(item.bytes, step.n) for item in (*payload[:2], step.summed))
    return DevicePlan((weights, step.trained, *_activations(saved and saved.total), logits), payload, sent, notes)


def borders_of(weights: Weights, head: int, stages: Sequence[range]) -> list[int]:
    """Before which layers hidden states change devices; as many as there are layers for the output head.

    head: bytes of an output head of its own, on the last device; 0 for one that is the embedding, on the first.
    """
    last = len(weights.layers)
    # what is outside of the layers is in front of them
    holds = [bool(stage) or (place == 0 and weights.outside > head) for place, stage in enumerate(stages)]
    where = [place for place, stage in enumerate(stages) for _ in stage]
    path = [holds.index(True), *where, len(stages) - 1 if head else 0]
    return [layer for layer in range(last + 1) if path[layer] != path[layer + 1]]


def _device_map(step: _Step) -> DevicePlan:
    saved, notes = step.saved()
    weights = weights_of(step.decoder)
    head = 0 if step.tied else step.head.weight.numel() * step.head.weight.itemsize
    stages = stages_of(weights, head, step.n)
    shares = [sum(weights.layers[layer] for layer in stage) for stage in stages]
    shares[0] += weights.outside - head
    shares[-1] += head
    shares = [share + weights.buffers for share in shares]
    kept = saved and saved.outside + max(sum(saved.layers[layer] for layer in stage) for stage in stages)
    hidden = step.tokens * step.dtype.itemsize * step.model.get_input_embeddings().weight.shape[1]
    borders = borders_of(weights, head, stages)
    payload = (
        Item("hidden states, from device to device", len(borders) * hidden),
        Item("their gradients, back", sum(border > step.lowest.index for border in borders) * hidden),
    )
    memory = (
        Item(f"weights, the largest of {step.n} parts", max(shares), FORMULA),
        step.trained,
        *_activations(kept),
        step.logits(),
    )
    notes = (*notes, "One device computes at a time: this mode makes room, and saves no time.")
    return DevicePlan(memory, payload, sum(hidden for item in payload if item.bytes), notes)


# how the devices share the work, by the names that `plan` takes
MODES = {"ddp": _ddp, "fsdp": _fsdp, "tp": _tp, "device-map": _device_map}
