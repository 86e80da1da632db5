"""How long a step takes under an engine on this machine: measured once, remembered in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import transformers
from torch import Tensor

from lofit_fast.files import write_json
from lofit_fast.models.load import cache_folder
from lofit_fast.patching.architectures import find_projections, fingerprint
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.engine.attachment import Attachment

_REPEATS = 3
# a step that takes less than this share of what is remembered: then the machine was busy, and may have misled
_BUSIER = 0.75

Timing = dict[str, float]
Batch = Mapping[str, Tensor]


class Timings:
    """Seconds of a model's training steps under several engines, from the cache or measured now.

    batch: makes what the model is called with under an engine. The model is left as it was.
    """

    def __init__(self, handle: Attachment, batch: Callable[[Engine], Batch]) -> None:
        self.handle, self.batch = handle, batch
        ids = batch(Engine(packing=False))["input_ids"]
        self.device, self._tokens = ids.device, ids.numel()
        key = json.dumps(_key(handle, ids), sort_keys=True)
        self._path = cache_folder() / "timings" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        self._known = self._kept()
        self._remembered = set(self._known)

    def of(self, engines: Sequence[Engine]) -> list[Timing]:
        """Of each engine "first", the seconds of its first step, "step", the least of those after it, and "tokens", how
        many the padded batch has.

        Engines that are not known are measured in turns, so that a machine that is busy for a while is so for all.
        Seconds are infinite where a step fails, as it does where there is no compiler.
        """
        new = [engine for engine in engines if not self.knows(engine)]
        if new:
            self._known |= zip(map(self._name, new), self._measured(new), strict=True)
            # a cache that cannot be written is no reason not to train
            with contextlib.suppress(OSError):
                # with what another process has measured meanwhile
                write_json(self._path, self._kept() | self._known)
        return [self._known[self._name(engine)] for engine in engines]

    def knows(self, engine: Engine) -> bool:
        """Whether `of` has the answer without measuring."""
        return self._name(engine) in self._known

    def refreshed(self, engine: Engine) -> bool:
        """Forget everything where a step now takes much less than is remembered; returns whether that was so.

        What else was remembered then is as doubtful, and the choices made of it. Fewer tokens than those of the time
        are expected to take less, in proportion; more, no less. Two steps; none where it was measured by this object.
        """
        if self._name(engine) not in self._remembered:
            return False
        [now], then = self._measured([engine], repeats=1), self._known[self._name(engine)]
        if now["step"] >= _BUSIER * then["step"] * min(1.0, now["tokens"] / then["tokens"]):
            return False
        self._known, self._remembered = {}, set()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
        return True

    def _kept(self) -> dict[str, Timing]:
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}

    def _name(self, engine: Engine) -> str:
        """What a timing is kept as: all that is timed of an engine, and the share of the tokens that packing leaves."""
        named = {"narrow": engine.narrow is True, "compiled": engine.compile}
        words = [engine.attention, *(word for word, chosen in named.items() if chosen)]
        if engine.packing:
            words.append(f"packed to {self.batch(engine)['input_ids'].numel() / self._tokens:.1f}")
        return ", ".join(words)

    def _measured(self, engines: Sequence[Engine], repeats: int = _REPEATS) -> list[Timing]:
        model, parameters = self.handle.model, list(self.handle.parameters())
        batches = [self.batch(engine) for engine in engines]
        taken: dict[int, list[float]] = {number: [] for number in range(len(engines))}
        with torch.random.fork_rng():
            for _ in range(1 + repeats):
                for number in list(taken):
                    with prepared(model, engines[number]):
                        try:
                            taken[number].append(_seconds_of_step(model, batches[number], parameters))
                        except RuntimeError:
                            # no compiler here, say: not a candidate
                            del taken[number]
        seconds = [taken.get(number, [float("inf")] * 2) for number in range(len(engines))]
        return [{"first": first, "step": min(later), "tokens": self._tokens} for first, *later in seconds]


def _seconds_of_step(model, batch: Batch, parameters) -> float:
    started = time.perf_counter()
    torch.autograd.grad(model(**batch, use_cache=False).loss, parameters)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _key(handle: Attachment, ids: Tensor) -> dict[str, object]:
    """Whatever could turn a choice around. ids: (B, S), a padded batch."""
    on_gpu = ids.device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(ids.device) if on_gpu else f"{platform.machine()} {platform.node()}",
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "model": fingerprint(handle.model, find_projections(handle.model)).as_dict(),
        "dtype": str(next(handle.model.parameters()).dtype),
        "scales": handle.config.scale is not None if isinstance(handle, LofitHandle) else type(handle).__name__,
        # powers of two
        "rows, length": [ids.shape[0], ids.shape[1].bit_length()],
        "versions": [torch.__version__, transformers.__version__],
    }
