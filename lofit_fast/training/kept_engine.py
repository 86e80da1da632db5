"""The engine of a stage that goes on: the one that it was begun with, whatever the rules say by now."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from lofit_fast.training.engine import CHANGEABLE, Engine
from lofit_fast.training.engine.cpu_extras import prepacking_refusal

# what runs of earlier releases did without saying so
_EARLIER = {"prepack": False}


def check_begun(path: Path, kept: Mapping[str, object], asked: Engine, names: Iterable[str]) -> None:
    """Raise ValueError for a knob that is asked for otherwise than a stage was begun with.

    path: of the run folder, for the error. kept: the stage's settled engine as the folder has it.
    """
    # a run of an earlier release lacks later knobs, and did what they do by default
    kept = {**asdict(Engine()), **kept}
    for name in names:
        if (value := getattr(asked, name)) not in ("auto", kept[name]):
            raise ValueError(
                f"{path} holds a run that was begun with {name}={kept[name]}, got {value}: choose another "
                "folder, or start over with resume=False (--no-resume)"
            )


def begun_engine(path: Path, kept: Mapping[str, object], asked: Engine, usable: Engine) -> Engine:
    """The kept engine, but for how much disk and memory it may take, which can be changed: CHANGEABLE.

    asked: what is asked for now. usable: the same as far as the stage can use it.
    Raises ValueError as `check_begun`, and for an engine of a later release.
    """
    kept = _EARLIER | dict(kept)
    check_begun(path, kept, asked, (name for name in asdict(Engine()) if name not in CHANGEABLE))
    changed = {name: value for name in CHANGEABLE if (value := getattr(usable, name)) != "auto"}
    try:
        return Engine(**kept | changed)
    except TypeError as error:
        raise ValueError(
            f"{path} holds a run whose engine this release does not know ({error}): go on with the release "
            "that began it, choose another folder, or start over with resume=False (--no-resume)"
        ) from error


def with_weights(engine: Engine, asked: Engine, model: nn.Module, stage: str, progress: bool) -> Engine:
    """The engine of a stage that goes on, without prepacked weights where there are none here: they only round.

    Where they were asked for, they stay, and `prepared` refuses them.
    """
    reason = prepacking_refusal(model) if engine.prepack and asked.prepack is not True else None
    if reason is None:
        return engine
    if progress:
        print(f"the step {stage!r} was begun with prepacked weights and goes on without: {reason}", file=sys.stderr)
    return replace(engine, prepack=False)
