"""What of a run folder is a run's own: told from what others have put there, taken away, and refused as links."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from lofit_fast.scratch import remove_abandoned
from lofit_fast.training.stage_checkpoints import OURS, remove

STATE = "state.json"
FILES = ("heads.json", "history.jsonl", "summary.json", "heads.png", "loss.png")
# scratch folders of writes that were killed
_SCRATCH = r"\.lofit-.*"
_STAGE = re.compile(rf"{OURS.pattern}|adapter|{_SCRATCH}")
# the run's folders, and which names in them are its own
FOLDERS = {
    "select": _STAGE,
    "tune": _STAGE,
    "adapter": re.compile(rf"adapter_config\.json|adapter_model\.safetensors|{_SCRATCH}"),
    "profile": re.compile(rf"(select|tune)(\.json\.gz|\.md|-summary\.json)|{_SCRATCH}"),
}


def left_in(folder: Path) -> list[str]:
    """The names of a run's folders and files that are there, whoever has made them."""
    return [name for name in (*FOLDERS, *FILES) if _is_there(folder / name)]


def check_places(folder: Path) -> None:
    """Raise ValueError for links in a run's places, which lead to none of the run's, and for a file in a folder's."""
    for name in (STATE, *FOLDERS, "select/adapter", *FILES):
        if (folder / name).is_symlink():
            raise ValueError(
                f"{folder / name} is a link, and a run reads and writes in its own folder alone: put there what it "
                "leads to, or start over with resume=False (--no-resume), which takes the link away"
            )
    for name in FOLDERS:
        if (folder / name).is_file():
            raise ValueError(
                f"{folder / name} is a file, where a run has a folder: put it elsewhere, or start over with "
                "resume=False (--no-resume), which takes it away"
            )


def clear(folder: Path) -> None:
    """Take a run's files away, but for its state. Links go, and nothing that they lead to; what is not ours stays.

    Raises OSError where something cannot be taken away. It may be interrupted anywhere, and called again.
    """
    for name, ours in FOLDERS.items():
        path = folder / name
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
            continue
        for child in list(path.iterdir()):
            if ours.fullmatch(child.name):
                remove(child)
        with suppress(OSError):
            # somebody else's files keep it
            path.rmdir()
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def clear_scratch(folder: Path) -> None:
    """Take away the scratch folders that killed writes have left in a run folder, its own folders and checkpoints."""
    own = [folder / name for name in FOLDERS if not (folder / name).is_symlink()]
    with suppress(OSError):
        own += [path for stage in own for path in stage.glob("checkpoint-*") if not path.is_symlink()]
    for place in (folder, *own):
        remove_abandoned(place)


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()
