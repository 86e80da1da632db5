"""The model card of an adapter: what it is for, how it was made and how it is loaded, filled from the run's summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath

from lofit_fast.config import Head
from lofit_fast.files import read_json
from lofit_fast.patching.hub_adapters import is_repository
from lofit_fast.patching.seal import tensors_digest
from lofit_fast.patching.storage import Adapter

CARD_FILE, PICTURE_FILE = "README.md", "heads.png"
# how a card shows the picture that lies beside it
SHOWN_PICTURE = f"![the heads]({PICTURE_FILE})"
LIBRARY = "lofit-fast"
_PAPER = "[LoFiT](https://arxiv.org/abs/2406.01563)"
# what a summary calls it -> what the card calls it
_RESULTS = {
    "accuracy_after_tune": "exact match after step 2",
    "accuracy_after_select": "exact match after step 1",
    "accuracy_before": "exact match of the base",
    "mc1": "MC1",
    "mc2": "MC2",
    "preference_accuracy": "share of preferred answers that score higher",
}
_MADE_WITH = ("lofit_fast", "torch", "transformers", "device", "dtype")


def run_summary(run: Path | str | None, adapter: Adapter) -> dict[str, object]:
    """The summary.json of the run folder that an adapter comes from; empty without a run.

    Raises FileNotFoundError for a folder without one, ValueError for one that is damaged, or of another adapter.
    """
    if run is None:
        return {}
    path = Path(run) / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} is no finished run of lofit-fast train: summary.json not found")
    summary = read_json(path)
    if not isinstance(summary, dict):
        raise ValueError(f"{path} is no summary of a run: expected entries by name, got {type(summary).__name__}")
    digest = tensors_digest(adapter.tensors)
    if summary.get("adapter_digest", digest) != digest:
        raise ValueError(
            f"{run} is the run of another adapter: its digest is {str(summary['adapter_digest'])[:12]}, that of this "
            f"handle is {digest[:12]}"
        )
    return summary


def card_of(adapter: Adapter, summary: Mapping[str, object], repo_id: str, license: str | None, picture: bool) -> str:
    """The card's text. summary: of the run, or nothing. picture: whether PICTURE_FILE lies beside it."""
    parts = [
        _front_matter(adapter, license),
        f"# {repo_id.rpartition('/')[2]}",
        _what_it_is(adapter, summary),
        _use(adapter, repo_id),
        _made(summary),
        _results(summary),
        _heads(adapter, picture),
        _license(license),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def public_base(adapter: Adapter) -> str | None:
    """The base model's name, where it is one of the hub and no folder of whoever has trained."""
    name = adapter.base_model
    return name if is_repository(name) and not Path(name).exists() else None


def _front_matter(adapter: Adapter, license: str | None) -> str:
    from huggingface_hub import ModelCardData

    tags = ["lofit", "adapter", "attention-heads"]
    data = ModelCardData(base_model=public_base(adapter), library_name=LIBRARY, license=license, tags=tags)
    return f"---\n{data.to_yaml().strip()}\n---"


def _what_it_is(adapter: Adapter, summary: Mapping[str, object]) -> str:
    numbers = sum(tensor.numel() for tensor in adapter.tensors.values())
    heads = _all_heads(adapter)
    base = public_base(adapter)
    named = f"[{base}](https://huggingface.co/{base})" if base else f"`{_line(summary.get('model')) or 'its base'}`"
    acts = "" if adapter.config.positions == "all" else " They act on answers alone."
    return (
        f"An adapter for {named}, trained by {_PAPER}: {numbers:,} numbers on {len(heads)} attention heads, "
        f"{' and '.join(kind for kind in ('scale', 'offset') if getattr(adapter.config, kind) is not None)} vectors."
        f"{acts}"
    )


def _use(adapter: Adapter, repo_id: str) -> str:
    base = public_base(adapter) or "BASE"
    return (
        "## Use\n\n```python\nimport lofit_fast as lf\n\n"
        f'model, tokenizer = lf.load_model("{base}")\nhandle = lf.load(model, "{repo_id}")\n```\n\n'
        f"```\nlofit-fast serve --model {base} --adapter {repo_id.rpartition('/')[2]}={repo_id}\n```\n\n"
        f"The base's weights have the digest `{adapter.base_digest or 'unknown'}`. On other weights of the same shape "
        "loading warns; with `strict=True` it refuses."
    )


def _made(summary: Mapping[str, object]) -> str:
    if not summary:
        return ""
    recipe, environment = summary.get("recipe"), summary.get("environment")
    rows = {name: summary.get(name) for name in ("task", "data", "train_size", "data_seed")}
    # of whoever has trained, the folders are nobody's business
    rows["data"] = _without_folders(rows["data"])
    rows |= recipe if isinstance(recipe, dict) else {}
    made_with = {name: environment.get(name) for name in _MADE_WITH} if isinstance(environment, dict) else {}
    return "## Training\n\n" + _table("setting", {k: v for k, v in {**rows, **made_with}.items() if v is not None})


def _without_folders(data: object) -> object:
    """The name of a file; a data set of the hub is named as it is."""
    public = not isinstance(data, str) or (is_repository(data) and not Path(data).exists())
    return data if public else PurePath(data).name


def _results(summary: Mapping[str, object]) -> str:
    found = {words: summary[name] for name, words in _RESULTS.items() if isinstance(summary.get(name), float)}
    shown = {words: f"{value:.4f}" for words, value in found.items()}
    return "## Results\n\nOn the data that was set aside:\n\n" + _table("metric", shown) if shown else ""


def _heads(adapter: Adapter, picture: bool) -> str:
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(_all_heads(adapter)):
        by_layer.setdefault(layer, []).append(head)
    listed = _table("layer", {str(layer): ", ".join(map(str, heads)) for layer, heads in by_layer.items()}, "heads")
    return "## Heads\n\n" + (f"{SHOWN_PICTURE}\n\n" if picture else "") + listed


def _all_heads(adapter: Adapter) -> set[Head]:
    named: set[Head] = set()
    for component in ("scale", "offset"):
        heads = getattr(adapter.config, component)
        if heads == "all":
            rows = {layer: len(t) for (kind, layer), t in adapter.tensors.items() if kind == component}
            heads = [(layer, head) for layer, count in rows.items() for head in range(count)]
        named.update(heads or ())
    return named


def _license(license: str | None) -> str:
    said = f"The vectors: {license}." if license else "No licence was stated for the vectors; ask who made them."
    return f"## Licence\n\n{said} The base model keeps its own."


def _table(left: str, rows: Mapping[str, object], right: str = "value") -> str:
    lines: Iterable[str] = (f"| {_line(name)} | {_line(value)} |" for name, value in rows.items())
    return "\n".join([f"| {left} | {right} |", "|---|---|", *lines])


def _line(value: object) -> str:
    """A value in a cell of a table."""
    return "" if value is None else " ".join(str(value).split()).replace("|", "\\|")[:200]
