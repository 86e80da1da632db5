"""Putting an adapter on the Hugging Face hub: its two files, a model card, and a picture of the heads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from lofit_fast.config import shown
from lofit_fast.extras import can_draw
from lofit_fast.files import write_text
from lofit_fast.patching.hub_adapters import asking_the_hub, is_repository
from lofit_fast.patching.hub_card import CARD_FILE, LIBRARY, PICTURE_FILE, card_of, run_summary
from lofit_fast.patching.storage import CONFIG_FILE, TENSOR_FILE, Adapter, save_adapter

_PUSHED = (CONFIG_FILE, TENSOR_FILE, CARD_FILE, PICTURE_FILE)


def push_adapter(
    adapter: Adapter,
    repo_id: str,
    *,
    run: Path | str | None = None,
    license: str | None = None,
    folder: Path | str | None = None,
    dry_run: bool = False,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str | None = None,
) -> str:
    """Push an adapter's two files to the hub in one commit, with a model card and a picture of the heads.

    Args:
        adapter: what is pushed.
        repo_id: `user/name`; made where there is none.
        run: the run folder that it comes from: the card tells of its data, recipe and results.
        license: of the vectors, by the hub's name for it.
        folder: where the files are written; without it they are gone afterwards.
        dry_run: write the folder and push nothing; the network is not used.
        revision: the branch to push to, made where there is none. private: whether a new repository is.
        token: of the hub; by default the one of `hf auth login`. message: of the commit.

    Returns:
        The address of the commit; the folder, if dry_run.

    Raises:
        ValueError: no such name or licence, a run of another adapter, a folder that holds another's README.md.
        FileNotFoundError: a run folder without a summary.
        OSError: the folder cannot be written, or the hub does not take it. Nothing has been pushed then.
    """
    _check(repo_id, license, folder, dry_run)
    summary = run_summary(run, adapter)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) if folder is None else Path(folder)
        _check_card(target)
        save_adapter(adapter, target)
        picture = _picture(adapter, None if run is None else Path(run), target)
        write_text(target / CARD_FILE, card_of(adapter, summary, repo_id, license, picture))
        if dry_run:
            return str(target)
        return _pushed(target, repo_id, revision, private, token, message or f"Adapter of {LIBRARY}")


def _check(repo_id: object, license: object, folder: object, dry_run: bool) -> None:
    if not isinstance(repo_id, str) or not is_repository(repo_id):
        raise ValueError(f"expected the hub's name of a repository, user/name, got {shown(repo_id)}")
    if license is not None and (not isinstance(license, str) or not license.strip() or "\n" in license):
        raise ValueError(f"expected a licence such as 'apache-2.0', or None, got {shown(license)}")
    if dry_run and folder is None:
        raise ValueError("dry_run=True pushes nothing: expected the folder to write to (folder=...)")


def _check_card(folder: Path) -> None:
    """Raise ValueError for a card that was not written here: it would be lost."""
    card = folder / CARD_FILE
    if card.exists() and f"library_name: {LIBRARY}" not in card.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{card} is no card of ours to replace: expected another folder")


def _picture(adapter: Adapter, run: Path | None, folder: Path) -> bool:
    """Put a picture of the heads into a folder: the run's, or one of the vectors' norms. Returns whether there is one.

    One of an earlier adapter is taken away.
    """
    (folder / PICTURE_FILE).unlink(missing_ok=True)
    if run is not None and (run / PICTURE_FILE).is_file():
        shutil.copyfile(run / PICTURE_FILE, folder / PICTURE_FILE)
        return True
    if not can_draw():
        return False
    from lofit_fast.plots import heads_map

    component = "scale" if adapter.config.offset is None else "offset"
    heads = getattr(adapter.config, component)
    norms = _norms(adapter, component)
    way = "lofit" if component == "scale" else "bias_norm"
    heads_map(norms, [] if heads == "all" else heads, folder / PICTURE_FILE, adapter.base_model, way)
    return True


def _norms(adapter: Adapter, component: str) -> torch.Tensor:
    """The norm of each head's vector, nought where it has none: (layers, heads) float32."""
    layers, counts = adapter.fingerprint.layers, adapter.fingerprint.heads
    vectors = {layer: t.detach().float().cpu() for (kind, layer), t in adapter.tensors.items() if kind == component}
    shape = max([layers, *(layer + 1 for layer in vectors)]), counts if isinstance(counts, int) else max(counts)
    norms = torch.zeros(shape, dtype=torch.float32)
    heads = getattr(adapter.config, component)
    for layer, rows in vectors.items():
        columns = range(len(rows)) if heads == "all" else sorted(head for at, head in heads if at == layer)
        norms[layer, list(columns)] = rows.norm(dim=1)
    return norms


def _pushed(
    folder: Path, repo_id: str, revision: str | None, private: bool | None, token: str | None, message: str
) -> str:
    """Push a folder's files in one commit; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(library_name=LIBRARY, token=token)
    with asking_the_hub(repo_id, revision, pushing=True):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        pushed = {"repo_id": repo_id, "folder_path": folder, "revision": revision, "commit_message": message}
        return str(api.upload_folder(**pushed, allow_patterns=list(_PUSHED)).commit_url)
