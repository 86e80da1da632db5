"""Which base a run is trained on, as its folder keeps it: weights, settings, and what its modules have of their own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lofit_fast.models.base_digest import base_digest, base_modules, same_base, settings_of, weights_of
from lofit_fast.patching.architectures import Projection, fingerprint
from lofit_fast.patching.peft_layers import tuner_layers
from lofit_fast.patching.placement import is_dense
from lofit_fast.training.run_digests import weights_digest

# digits kept of a number, and how near it must be: the last bits of a computed one depend on the machine
_DIGITS, _CLOSE = 4, 2e-3
# rotary angles that follow the longest text so far
_FOLLOWING = ("dynamic", "longrope")


def base_of(model: nn.Module, projections: Sequence[Projection]) -> dict[str, object]:
    """Plain data that tells a run's base from another. Of a model that FSDP2 shards all processes must call it."""
    entries = {
        **fingerprint(model, projections).as_dict(),
        # of packed weights, which a base's digest cannot tell apart; and all that earlier releases knew
        "weights": weights_digest(p.module for p in projections),
        "base": base_digest(model),
        "settings": settings_of(model),
        "numbers": numbers_of(model),
    }
    adapters = _adapters_of(model)
    return entries if adapters is None else {**entries, "adapters": adapters}


def numbers_of(model: nn.Module) -> dict[str, list[float]]:
    """By name, the different numbers that a model's modules compute with beside their weights, ascending.

    A number is an attribute, such as the scaling of an attention, or the norm of a buffer that no file holds, such as
    rotary angles. They come from the config when a model is made, but either may be changed afterwards.
    """
    found: dict[str, set[float]] = {}
    for module in base_modules(model):
        for name, value in _own_numbers(module):
            found.setdefault(name, set()).add(float(f"{value:.{_DIGITS}g}"))
    return {name: sorted(values) for name, values in sorted(found.items())}


def _own_numbers(module: nn.Module) -> Iterator[tuple[str, float]]:
    for name, value in vars(module).items():
        if type(value) is float and math.isfinite(value) and not name.startswith("_"):
            yield name, value
    kinds = str(getattr(module, "rope_type", ""))
    if any(kind in kinds for kind in _FOLLOWING):
        return
    for name in module._non_persistent_buffers_set:
        value = module._buffers.get(name)
        here = isinstance(value, Tensor) and is_dense(value) and value.device.type != "meta"
        # cached sines have the length of the longest text so far
        norm = value.double().norm().item() if here and "cache" not in name else math.nan
        if math.isfinite(norm):
            yield name, norm


def _adapters_of(model: nn.Module) -> str | None:
    """A digest of what PEFT has put into the model: no digest of the base has it. None where there is nothing."""
    layers = [layer for _, _, layer in tuner_layers(model)]
    if not layers:
        return None
    own = [module for layer in layers for name, module in layer.named_modules() if name.split(".")[0] != "base_layer"]
    total = hashlib.sha256()
    for layer in layers:
        scaling = getattr(layer, "scaling", None)
        told = [list(getattr(layer, "active_adapters", ())), getattr(layer, "disable_adapters", False), scaling]
        total.update(repr(told).encode())
    # what is in parts is not the same in all processes
    dense = [m for m in own if all(is_dense(t) and t.device.type != "meta" for t in m.parameters(recurse=False))]
    with torch.no_grad():
        for digest in weights_of(dense):
            total.update(digest.encode())
    return total.hexdigest()


def as_now(now: Mapping[str, object]) -> Callable[[dict], dict]:
    """A function that brings a kept identity up to date where the base is the same. now: today's "model"."""

    def turned(before: dict) -> dict:
        model = before.get("model")
        if not isinstance(model, dict):
            return before
        kept = model.get("base", "")
        # an earlier release knew the first rows of the projections alone; of packed weights digests cannot tell
        if kept == "" or (isinstance(kept, str) and same_base(kept, now["base"]) is not False):
            model = {**model, "base": now["base"]}
        settings = _known(model.get("settings"), now["settings"])
        # 10000 and 10000.0, as versions of transformers have it
        settings = {
            name: value if settings[name] == value else settings[name] for name, value in now["settings"].items()
        }
        numbers = _known(model.get("numbers"), now["numbers"])
        numbers = {
            name: today if _close(numbers[name], today) else numbers[name] for name, today in now["numbers"].items()
        }
        adapters = {"adapters": now["adapters"]} if "adapters" in now and "numbers" not in model else {}
        return {**before, "model": {**model, **adapters, "settings": settings, "numbers": numbers}}

    return turned


def _known(kept: object, now: Mapping[str, object]) -> dict[str, object]:
    """The entries as they were kept, and today's where a run of an earlier release, or of another version, has none."""
    known = kept if isinstance(kept, dict) else {}
    return {name: known.get(name, value) for name, value in now.items()}


def _close(kept: object, now: Sequence[float]) -> bool:
    if not isinstance(kept, list) or len(kept) != len(now) or not all(type(x) in (int, float) for x in kept):
        return False
    return all(math.isclose(a, b, rel_tol=_CLOSE) for a, b in zip(kept, now, strict=True))
