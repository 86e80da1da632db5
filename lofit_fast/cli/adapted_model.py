"""The model that a command works on: the base, with an adapter in it where one was given."""

from pathlib import Path


def loaded(model: str, adapter: Path | None, dtype: str, device: str):
    """(model, tokenizer). Raises what loading either raises."""
    from lofit_fast.models.load import load_model
    from lofit_fast.patching.handle import load

    base, tokenizer = load_model(model, dtype=dtype, device=device)
    if adapter is not None:
        load(base, adapter)
    return base, tokenizer
