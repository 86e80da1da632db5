"""A model's attention set to another implementation for a while, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn

from lofit_fast.data.pack import GROUPED
from lofit_fast.patching.architectures import text_config
from lofit_fast.training.engine.causal_attention import CAUSAL, marked_batches
from lofit_fast.training.engine.causal_attention import register as register_causal
from lofit_fast.training.engine.cpu_extras import register_attention

_KEPT = "_attn_implementation_internal"
# attentions of ours, for decoders
OURS = (GROUPED, CAUSAL)


class UnusableAttention(ValueError):
    """An attention that a model or machine does not have."""


@contextmanager
def attending(model: nn.Module, name: str) -> Iterator[None]:
    """A scope in which the model attends by an implementation; afterwards every config is as it was.

    name: one of transformers', for all parts of the model, or GROUPED or CAUSAL, for its decoder alone. What the
    decoder has already is left to all parts as it is.
    Raises UnusableAttention, with everything as it was, for one that the model or the machine does not have.
    """
    register_attention()
    register_causal()
    before = [(config, _implementation(config)) for config in _configs(model)]
    had = text_config(model)._attn_implementation
    try:
        try:
            # a tower may lack what the decoder has already
            if name != had:
                (_decoder(model) if name in OURS else model).set_attn_implementation(name)
        except (ImportError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnusableAttention(f"attention {name!r} cannot be used here: {reason}") from error
        # transformers only warns of a model with attention code of its own
        if name != had and text_config(model)._attn_implementation == had:
            raise UnusableAttention(
                f"attention {name!r} cannot be used here: {type(model).__name__} has attention code of its own, "
                f"and stays with {had!r}: choose 'auto' or {had!r}"
            )
        with marked_batches(model) if name == CAUSAL else nullcontext():
            yield
    finally:
        for config, value in before:
            # the public name would set what is below it too
            setattr(config, _KEPT if hasattr(config, _KEPT) else "_attn_implementation", value)


def _implementation(config) -> str | None:
    return getattr(config, _KEPT, getattr(config, "_attn_implementation", None))


def _configs(model: nn.Module) -> list:
    """Those of all modules, and the ones inside them that no module holds."""
    found: dict[int, object] = {}
    waiting = [module.config for module in model.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())


def _decoder(model: nn.Module) -> nn.Module:
    """The outermost module that the text config is the whole config of: a vision tower beside it is left alone."""
    config = text_config(model)
    owners = (m for m in model.modules() if getattr(m, "config", None) is config)
    return next((m for m in owners if hasattr(m, "set_attn_implementation")), model)
