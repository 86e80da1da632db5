"""A check that processes which hold one model together still train the same vectors.

Each trains by itself. Gradients are summed where they arise, and outputs are whole in each process, so that the
vectors stay the same to the last bit. A plan that gives a process only parts of the logits, or dropout that differs
between processes, would break this without an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from transformers import TrainerCallback

from lofit_fast import ranks
from lofit_fast.models.trials import rounding


class AlikeSteps(TrainerCallback):
    """Compares losses and vectors after the first step, and at the end of each epoch, before it is saved.

    model: the one that the processes hold together. vectors: returns the trained ones. last_loss: returns the loss of
    the last step.
    Raises ValueError, in every process, where losses differ by more than rounding, or the vectors at all.
    """

    def __init__(
        self, model: nn.Module, vectors: Callable[[], Iterable[Tensor]], last_loss: Callable[[], float]
    ) -> None:
        self.allowed, self.vectors, self.last_loss = rounding(model), vectors, last_loss
        self._looked = False

    def on_train_begin(self, args, state, control, **_):
        """The first step is still to come."""
        self._looked = False

    def on_step_end(self, args, state, control, **_):
        """Compare after the first step."""
        if not self._looked:
            self._looked = True
            self._look(state.global_step)

    def on_epoch_end(self, args, state, control, **_):
        """Compare after the last step."""
        self._look(state.global_step)

    def _look(self, step: int) -> None:
        digest = hashlib.sha256()
        for vectors in self.vectors():
            digest.update(vectors.detach().cpu().numpy().tobytes())
        losses, digests = zip(*ranks.gathered((self.last_loss(), digest.hexdigest()[:12])), strict=True)
        off = max(losses) - min(losses) > self.allowed * max(1.0, abs(losses[0]))
        if off or len(set(digests)) > 1:
            what, values = ("losses", losses) if off else ("vectors", digests)
            listed = "; ".join(f"process {number}: {value}" for number, value in enumerate(values))
            raise ValueError(
                f"the processes hold one model together, but after step {step} their {what} differ ({listed}): "
                "expected a tensor-parallel plan that gives each of them whole logits, and layers that drop the same "
                "numbers in all"
            )
