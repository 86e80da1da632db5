"""Putting an adapter on the Hugging Face hub: its two files, a model card, and a picture of the heads."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lofit_fast.config import shown
from lofit_fast.extras import can_draw
from lofit_fast.files import given_path, whole_folder, write_text
from lofit_fast.patching.adapter_places import check_place
from lofit_fast.patching.hub_adapters import asking_the_hub, is_repository
from lofit_fast.patching.hub_card import CARD_FILE, LIBRARY, PICTURE_FILE, SHOWN_PICTURE, card_of, run_summary
from lofit_fast.patching.storage import CONFIG_FILE, TENSOR_FILE, Adapter, save_adapter

_MADE = (CONFIG_FILE, TENSOR_FILE, CARD_FILE)


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
        folder: where the files are written, all of them or none; without it they are gone afterwards. The files of an
            earlier push are replaced, and other files stay.
        dry_run: write the folder and push nothing; the network is not used.
        revision: the branch to push to, made where there is none. private: whether a new repository is.
        token: of the hub; by default the one of `hf auth login`. message: of the commit.

    Returns:
        The address of the commit; the folder, if dry_run.

    Raises:
        ValueError: no such name or licence, a run of another adapter, a folder that is the run's, or that holds a
            README.md or a heads.png of somebody else's, a model, or an adapter of another kind; dry_run beside what
            only a push takes (revision, private, message); a repository that is there, and is not as `private` says.
        FileNotFoundError: a run folder without a summary.
        OSError: the folder cannot be written, or the hub does not take it. Nothing has been pushed then.
    """
    _check(repo_id, license)
    if dry_run:
        _check_dry(folder, {"revision": revision, "private": private, "message": message})
    summary = run_summary(run, adapter)
    with tempfile.TemporaryDirectory() as passing:
        target = Path(passing) if folder is None else given_path(folder)
        stale = _check_place(target, run)
        with whole_folder(target, last=CONFIG_FILE) as scratch:
            save_adapter(adapter, scratch)
            picture = _picture(adapter, run, scratch / PICTURE_FILE)
            write_text(scratch / CARD_FILE, card_of(adapter, summary, repo_id, license, picture))
        if stale and not picture:
            (target / PICTURE_FILE).unlink()
        if dry_run:
            return str(target)
        made = (*_MADE, PICTURE_FILE) if picture else _MADE
        return _pushed(target, made, repo_id, revision, private, token, message or f"Adapter of {LIBRARY}")


def _check(repo_id: object, license: object) -> None:
    if not isinstance(repo_id, str) or not is_repository(repo_id):
        raise ValueError(f"expected the hub's name of a repository, user/name, got {shown(repo_id)}")
    if license is not None and (not isinstance(license, str) or not license.strip() or "\n" in license):
        raise ValueError(f"expected a licence such as 'apache-2.0', or None, got {shown(license)}")


def _check_dry(folder: object, of_pushes: Mapping[str, object]) -> None:
    """Raise ValueError for a dry run without a folder, or with settings that only a push has."""
    if folder is None:
        raise ValueError("dry_run=True pushes nothing: expected the folder to write to (folder=...)")
    if idle := [name for name, value in of_pushes.items() if value is not None]:
        raise ValueError(f"dry_run=True pushes nothing: expected no {' or '.join(idle)} beside it")


def _check_place(folder: Path, run: Path | str | None) -> bool:
    """Raise ValueError for a folder with files of somebody else's that would be lost.

    Returns whether an earlier push has put a picture there, which its card shows.
    """
    if run is not None and folder.exists() and folder.samefile(run):
        raise ValueError(f"{folder} is the run's own folder, whose files would be lost: expected another folder")
    check_place(folder, CONFIG_FILE, "LOFIT")
    card, picture = folder / CARD_FILE, folder / PICTURE_FILE
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    if text and f"library_name: {LIBRARY}" not in text:
        raise ValueError(f"{card} is no card of ours to replace: expected another folder")
    there = picture.exists() or picture.is_symlink()
    if there and SHOWN_PICTURE not in text:
        raise ValueError(f"{picture} is no picture of ours to replace: expected another folder")
    return there


def _picture(adapter: Adapter, run: Path | str | None, path: Path) -> bool:
    """Write a picture of the heads: the run's, or one of the vectors' norms. Returns whether there is one."""
    if run is not None and (Path(run) / PICTURE_FILE).is_file():
        shutil.copyfile(Path(run) / PICTURE_FILE, path)
        return True
    if not can_draw():
        return False
    from lofit_fast.plots import heads_map

    component = "scale" if adapter.config.offset is None else "offset"
    heads = getattr(adapter.config, component)
    norms = _norms(adapter, component)
    way = "lofit" if component == "scale" else "bias_norm"
    heads_map(norms, [] if heads == "all" else heads, path, adapter.base_model, way)
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
    folder: Path,
    names: Sequence[str],
    repo_id: str,
    revision: str | None,
    private: bool | None,
    token: str | None,
    message: str,
) -> str:
    """Push files of a folder in one commit; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(library_name=LIBRARY, token=token)
    with asking_the_hub(repo_id, revision, pushing=True):
        api.create_repo(repo_id, private=private, exist_ok=True)
        # of one that was there, the hub leaves it as it is
        if private is not None and bool(api.repo_info(repo_id).private) is not private:
            kind = "public" if private else "private"
            raise ValueError(
                f"{repo_id} is {kind} already, and private={private} was asked for: nothing was pushed. Change that on "
                "the hub, or leave private out"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        pushed = {"repo_id": repo_id, "folder_path": folder, "revision": revision, "commit_message": message}
        return str(api.upload_folder(**pushed, allow_patterns=list(names)).commit_url)
