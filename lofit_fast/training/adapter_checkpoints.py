"""The adapter in the checkpoints of any Trainer, and of accelerate: saved, resumed, and the best one taken back."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lofit_fast.config import LofitConfig
from lofit_fast.files import file_errors
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.patched import handle_of
from lofit_fast.patching.storage import COMPONENTS, Adapter, check_fits, read_adapter
from lofit_fast.scratch import scratch_folder

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import TrainerControl, TrainerState, TrainingArguments

# two folders deep: Trainer takes a folder with adapter_model.safetensors right below a checkpoint for one of PEFT's
FOLDER = Path("lofit") / "adapter"
WEIGHTS = "model.safetensors"


class AdapterCheckpoints(TrainerCallback, ExportableState):
    """Keeps a handle's vectors with the checkpoints of transformers.Trainer, TRL's trainers, or accelerate.

    A patched model's state_dict is the base's, so Trainer's own checkpoints lack the vectors. With this callback
    every checkpoint has them, a resumed run goes on from them, and load_best_model_at_end takes the best ones back:

        Trainer(handle.model, args, ..., callbacks=[lf.AdapterCheckpoints(handle)])
        lf.AdapterCheckpoints(handle).follow(accelerator)

    Each checkpoint gets the folder lofit/adapter, which `lf.load` reads; so does the output folder when training ends.
    What a run resumes from is in trainer_state.json, wherever the checkpoint has been moved to.

    Args:
        handle: the patched model's; None finds it in the trained model.
        save_base: False takes the frozen base's weights out of each checkpoint again once Trainer has written it. What
            else is trained (a classifier's head) stays. Trainer then lists the base's keys as missing when it resumes.

    Of several adapters the handle's own is kept. Raises ValueError when a training begins while another is active, or
    resumes from a checkpoint without vectors, or with those of other heads; the model then keeps the vectors it had.
    """

    def __init__(self, handle: LofitHandle | None = None, *, save_base: bool = True) -> None:
        if handle is not None and not isinstance(handle, LofitHandle):
            raise TypeError(f"expected the handle of a patched model, got {type(handle).__name__}")
        self.handle, self.save_base = handle, save_base
        # of sharded vectors: (this process's parts, the state with all of them)
        self._whole: tuple[list, dict] | None = None
        if handle is not None:
            handle.check_live()
            handle.watches.load.expect(self)

    def follow(self, accelerator: Accelerator) -> AdapterCheckpoints:
        """Keep the vectors with the states of an accelerate.Accelerator: save_state writes them, load_state fills them.

        Each state gets the folder lofit/adapter. What accelerator.register_for_checkpointing keeps, accelerate
        unpickles without a check; this is read as safetensors and JSON, before anything else of the state is.
        load_state raises FileNotFoundError for a state without that folder, and ValueError for other heads.
        Raises ValueError without a handle.
        """
        if self.handle is None:
            raise ValueError("follow() needs to know the model: expected AdapterCheckpoints(handle), got no handle")

        def write(models: list, weights: list, folder: str) -> None:
            if accelerator.is_main_process or self.handle.in_parts:
                self.handle.save(Path(folder) / FOLDER, self.handle.own_name)

        def read(models: list, folder: str) -> None:
            adapter = read_adapter(Path(folder) / FOLDER)
            check_fits(adapter, self.handle.fingerprint)
            self._check_heads(_heads(adapter.config), f"the state in {folder}")
            self.handle.take(adapter)
            self.handle.watches.load.expect_base()

        accelerator.register_save_state_pre_hook(write)
        accelerator.register_load_state_pre_hook(read)
        return self

    def state_dict(self) -> dict:
        """The adapted heads, and the vectors by "<layer>.<component>": what a loop of one's own saves.

        Where FSDP2 shards the vectors all processes must call it, and each gets them whole.
        """
        whole = self.handle.whole_vectors()
        vectors = {f"{layer}.{kind}": v.clone().cpu() for (kind, layer), v in whole.items()}
        return {"heads": _heads(self.handle.config), "vectors": vectors}

    def load_state_dict(self, state: dict) -> None:
        """Take the vectors of a `state_dict`. Raises ValueError, changing nothing, for those of other heads."""
        self._restore(state, "the state")

    def state(self) -> dict:
        """What Trainer writes into a checkpoint's trainer_state.json."""
        # transformers builds a new callback from "args" and "attributes", where it is asked to
        exported = {"args": {"save_base": self.save_base}, "attributes": {}}
        if self.handle is None:
            return exported
        state = self._gathered_state() if self.handle.in_parts else self.state_dict()
        text = base64.b64encode(save(state["vectors"])).decode("ascii")
        return {**exported, "heads": state["heads"], "vectors": text, "sha256": _sum_of(text)}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """After a checkpoint was loaded: its vectors.

        Raises ValueError for another model than that of the handle, a hyperparameter search, and a checkpoint without
        vectors, with damaged ones, or with those of other heads.
        """
        self._find(model)
        # whose vectors would be in no checkpoint
        self.handle.check_own("keep checkpoints")
        if state.is_hyper_param_search:
            raise ValueError("AdapterCheckpoints cannot follow a hyperparameter search: its runs share one adapter")
        # a run that begins has made no step yet
        if state.global_step == 0:
            return
        written = state.stateful_callbacks.get(type(self).__name__)
        # with several callbacks of one name, each is the one of its own heads
        candidates = written if isinstance(written, list) else [written] if written else []
        ours = [one for one in candidates if one.get("heads") == _heads(self.handle.config)]
        found = (ours or candidates or [{}])[-1]
        where = f"the checkpoint of step {state.global_step}"
        if "vectors" not in found:
            raise ValueError(
                f"cannot resume: {where} has no LoFiT vectors, since it was written without AdapterCheckpoints; start "
                "anew, or lf.load() an adapter and train without resume_from_checkpoint"
            )
        try:
            # those of earlier releases have no checksum
            if found.get("sha256") not in (None, _sum_of(found["vectors"])):
                raise ValueError("they are not what was written")
            vectors = load(base64.b64decode(found["vectors"], validate=True))
        except (AttributeError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"cannot resume: the LoFiT vectors in {where} are damaged ({error}); resume from another one"
            ) from error
        self._restore({**found, "vectors": vectors}, where)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before a checkpoint, while all processes are here: what one of them writes into its state."""
        if (control.should_save or control.should_evaluate) and self.handle.in_parts:
            self._gather()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """As `on_step_end`."""
        self.on_step_end(args, state, control)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """After a checkpoint was written: the adapter beside it."""
        if not (args.should_save or self.handle.in_parts):
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.handle.save(checkpoint / FOLDER, self.handle.own_name)
        if args.should_save and not self.save_base:
            _drop_frozen(self.handle.model, checkpoint)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """The vectors of the best checkpoint, if Trainer has gone back to it; and the result in the output folder."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            adapter = read_adapter(Path(state.best_model_checkpoint) / FOLDER)
            check_fits(adapter, self.handle.fingerprint)
            self.handle.take(adapter)
        if args.should_save or self.handle.in_parts:
            self.handle.save(Path(args.output_dir) / FOLDER, self.handle.own_name)

    def _gather(self) -> None:
        parts = [v.to_local().clone() for v in self.handle.vectors().values()]
        self._whole = (parts, self.state_dict())

    def _gathered_state(self) -> dict:
        """What was gathered when all processes were here. Raises ValueError for vectors that have changed since."""
        parts, state = self._whole or ([], {})
        now = [v.to_local() for v in self.handle.vectors().values()]
        if len(parts) != len(now) or not all(map(torch.equal, parts, now)):
            raise ValueError(
                "cannot write sharded vectors into the trainer's state in one process: they are gathered when a step "
                "or an epoch ends with a checkpoint to come. Patch the model after it was sharded, or call "
                "handle.save() in every process"
            )
        return state

    def _find(self, model: nn.Module | None) -> None:
        if self.handle is None:
            found = handle_of(model)
            if found is None:
                raise ValueError("AdapterCheckpoints found no patched model in this trainer: lf.patch() it first")
            AdapterCheckpoints.__init__(self, found, save_base=self.save_base)
        self.handle.check_live()
        if model is not None and handle_of(model) is not self.handle:
            raise ValueError("AdapterCheckpoints has the handle of another model than the one that is trained")

    def _check_heads(self, got: dict, where: str) -> None:
        expected = _heads(self.handle.config)
        if got != expected:
            raise ValueError(
                f"{where} has vectors of other heads or positions: got {got}, expected {expected}; patch as it was"
            )

    def _restore(self, state: dict, where: str) -> None:
        if not isinstance(state, Mapping) or not {"heads", "vectors"} <= state.keys():
            raise ValueError(f"{where} is none of AdapterCheckpoints: expected heads and vectors in it")
        self._check_heads(state["heads"], where)
        tensors = {}
        for name, vector in state["vectors"].items():
            layer, _, component = name.partition(".")
            if not layer.isdecimal() or component not in COMPONENTS:
                raise ValueError(f"{where} has a vector called {name!r}, expected <layer>.scale or <layer>.offset")
            tensors[component, int(layer)] = vector
        handle = self.handle
        handle.take(Adapter(handle.config, tensors, handle.fingerprint, "", {}))


def _sum_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _heads(config: LofitConfig) -> dict:
    """The adapted heads, as JSON gives them back, and the positions where these are not all."""
    heads = json.loads(json.dumps({component: getattr(config, component) for component in COMPONENTS}))
    return heads if config.positions == "all" else {**heads, "positions": config.positions}


def _drop_frozen(model: nn.Module, checkpoint: Path) -> None:
    """Leave in a checkpoint's weights what is trained and no vector of ours."""
    files = sorted(checkpoint.glob("model*.safetensors"))
    # a sharded one has no numbers by whose place it could be told
    state = model.state_dict(keep_vars=True)
    wanted = {name for name, tensor in state.items() if getattr(tensor, "requires_grad", False)}
    kept: dict[str, torch.Tensor] = {}
    for file in files:
        kept |= {name: tensor for name, tensor in load_file(file).items() if name in wanted}
    if files:
        # in place before the others go: a process that is killed between them has lost nothing
        with file_errors(checkpoint), scratch_folder(checkpoint) as scratch:
            save_file(kept, scratch / WEIGHTS, metadata={"format": "pt"})
            os.replace(scratch / WEIGHTS, checkpoint / WEIGHTS)
    for file in (*files, *checkpoint.glob("model*.safetensors.index.json")):
        if file.name != WEIGHTS:
            file.unlink()
