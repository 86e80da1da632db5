"""The model that a command works on: the base, with an adapter in it where one was given."""

from pathlib import Path

from lofit_fast.cli.options import check_idle


def loaded(model: str, adapter: Path | str | None, dtype: str, device: str, strict: bool = False, spread: bool = False):
    """(model, tokenizer). strict: whether an adapter of other base weights is refused. spread: whether the
    processes of the launch hold the base together.

    Raises what loading either raises, and ValueError for strict without an adapter.
    """
    if adapter is None:
        check_idle("without --adapter there is none to refuse", {"--strict": strict})
    from lofit_fast.models.load import load_model
    from lofit_fast.patching.hub_adapters import adapter_folder
    from lofit_fast.patching.patch import load

    # before the base is loaded, which takes longer
    folder = None if adapter is None else adapter_folder(adapter)
    base, tokenizer = load_model(model, dtype=dtype, device=device, tensor_parallel=spread)
    if folder is not None:
        load(base, folder, strict=strict)
    return base, tokenizer
