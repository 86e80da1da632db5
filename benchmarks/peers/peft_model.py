"""A model wrapped by PEFT's `get_peft_model`, the way PEFT's users wrap it."""

from torch import nn

from benchmarks.peers.peer import Absent, Attached


def peft_attached(model: nn.Module, config: str, **options) -> Attached:
    """The model with one of PEFT's adapters in it.

    config: the name of a config class of PEFT. options: its arguments. Raises Absent where PEFT, or that class, is not
    installed.
    """
    try:
        import peft

        adapted = peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **options))
    except (ImportError, AttributeError) as error:
        raise Absent(f"PEFT's {config} is not installed here: {error}") from error
    return Attached(adapted, [p for p in adapted.parameters() if p.requires_grad])
