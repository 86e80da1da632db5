"""No work where nobody reads: the last layer's MLP runs on the rows whose logits are kept, and on no others.

After its attention the last decoder layer works on each token by itself, and so does all that follows. Of a batch that
brings `logits_to_keep` as a mask, or `kept_rows` as an index, the MLP's other rows change neither logits nor gradients.
Where a family has it another way, a trial on a few tokens gives other logits.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lofit_fast.data.collate import KEPT_ROWS, CompletionCollator, on_device
from lofit_fast.data.encode import IGNORED
from lofit_fast.models.logit_rows import SCOPED, logit_rows
from lofit_fast.models.row_index import n_tokens, selecting_rows
from lofit_fast.models.trials import difference, rounding, said_of, trial_examples, tried_once, trying
from lofit_fast.patching.architectures import architecture_of, decoder_layers, text_config
from lofit_fast.patching.cache_names import CACHES
from lofit_fast.patching.placement import device_of

_MASK = "logits_to_keep"
# who asks for one of these may read more of the last layer than what its logits need
_ASKS_FOR_MORE = ("output_hidden_states", "use_cache", *CACHES)


@contextmanager
def narrowed(model: nn.Module) -> Iterator[None]:
    """A scope in which the last layer's MLP computes the rows whose logits a batch asks for, and zeros elsewhere.

    model: what is called with the batches, a Hugging Face model or PEFT's wrapper of one. Logits and gradients are
    what they are without, up to rounding. Whoever listens to the last layer's output gets it without the MLP's part in
    the other rows. The MLP runs whole in a forward pass without `kept_rows` or a boolean mask (B, S), with a cache, or
    that gives out hidden states, and while its layer is checkpointed: the second run comes when the batch is gone.
    A model whose last layer has no MLP that is known to work row by row, and for the last time, is left alone. What is
    added is hooks, and all of them go. `narrowing_refusal` tries what cannot be read off a model.
    """
    layer, mlp = _found(model)
    hooks = [] if mlp is None else _narrow(model, layer, mlp)
    try:
        yield
    finally:
        _remove(hooks)


def narrowing_refusal(model: nn.Module) -> str | None:
    """Why narrowing would change a result, found on a few tokens; None where it would not, or leaves the model alone.

    What it notices: something after the last MLP that mixes tokens, or that reads its output in other rows.
    """
    return tried_once(model, "narrowing", lambda: _refusal(model))


def _refusal(model: nn.Module) -> str | None:
    layer, mlp = _found(model)
    if mlp is None:
        return None
    rows = trial_examples(model)
    # rows without a label between rows with one: what they lack must not be missed
    for row in rows:
        row["labels"][-3:] = [IGNORED, row["labels"][-2], IGNORED]
    # as training will ask
    way = "index" if logit_rows(model, SCOPED) == "index" else "rows"
    batch = on_device(CompletionCollator(0, logits=way)(rows), device_of(model))
    hooks: list[RemovableHandle] = []
    try:
        with trying(model):
            expected = _run(model, batch)
            hooks = _narrow(model, layer, mlp)
            got = _run(model, batch)
    except Exception as error:
        return f"{type(model).__name__} cannot be tried: {said_of(error)}"
    finally:
        _remove(hooks)
    allowed = rounding(model)
    moved = difference(got.logits, expected.logits)
    if not torch.isclose(got.loss.double(), expected.loss.double(), rtol=allowed, atol=allowed):
        moved = max(moved, ((got.loss - expected.loss) / expected.loss).abs().item())
    if moved <= allowed:
        return None
    return (
        f"something in {type(model).__name__} reads its last MLP in rows without a label: results move by {moved:.1e}"
    )


def _run(model: nn.Module, batch):
    with selecting_rows(model):
        return model(**batch, use_cache=False)


def _found(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """(the last layer, its MLP, or None where that must be left alone)."""
    layer = decoder_layers(model)[-1]
    mlp = dict(layer.named_modules()).get(architecture_of(model).ffn)
    usable = mlp is not None and _works_by_row(mlp) and _takes_masks(model) and _used_once(model, mlp)
    return layer, mlp if usable else None


def _narrow(model: nn.Module, layer: nn.Module, mlp: nn.Module) -> list[RemovableHandle]:
    rows = _Rows(model, layer)
    return [
        model.register_forward_pre_hook(rows.take, with_kwargs=True),
        model.register_forward_hook(rows.drop, always_call=True),
        # next to the MLP: what hangs on it already is given whole batches, before and after
        mlp.register_forward_pre_hook(rows.gather),
        mlp.register_forward_hook(rows.scatter, prepend=True),
    ]


def _remove(hooks: Sequence[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


@dataclass
class _Pass:
    """A forward pass of which some rows are read. index: (rows,) int64.

    tokens: (T, 0), of as many rows as the pass has tokens. A compiler takes a number that a hook brings for a constant,
    and would compile the layer for each T; a tensor's size may vary.
    shape: of the MLP's tokens, once it was given fewer rows.
    """

    index: Tensor
    tokens: Tensor
    shape: torch.Size | None = None


class _Here(threading.local):
    """The pass that goes on in a thread; None where all rows are read, or none goes on."""

    def __init__(self) -> None:
        # of each thread anew, and there before a compiler looks
        self.now: _Pass | None = None


class _Rows:
    """What the hooks on a model and on the MLP of its last layer do."""

    def __init__(self, model: nn.Module, layer: nn.Module) -> None:
        self.model, self.layer, self.here = model, layer, _Here()

    def take(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # a replica of data parallelism shares these hooks, and runs beside the others
        if module is not self.model:
            return
        # a keyboard's interrupt runs no hooks: what it has ended is still there
        self.here.now = None
        if self._read_in_full(kwargs):
            return
        mask = kwargs.get(_MASK)
        if kwargs.get(KEPT_ROWS) is not None:
            self._begin(kwargs[KEPT_ROWS], n_tokens(args, kwargs))
        elif isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.dim() == 2:
            self._begin(mask.flatten().nonzero().flatten(), mask.numel())

    def _begin(self, index: Tensor, tokens: int) -> None:
        self.here.now = _Pass(index, index.new_empty(tokens, 0))

    def drop(self, module: nn.Module, args: tuple, output: object) -> None:
        if module is self.model:
            self.here.now = None

    def gather(self, mlp: nn.Module, args: tuple) -> tuple[Tensor] | None:
        now = self.here.now
        if now is None:
            return None
        now.shape = None
        if len(args) != 1 or args[0].shape[:-1].numel() != len(now.tokens):
            return None
        now.shape = args[0].shape[:-1]
        return (args[0].flatten(0, -2).index_select(0, now.index.to(args[0].device)),)

    def scatter(self, mlp: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        now = self.here.now
        if now is None or now.shape is None:
            return None
        whole = output.new_zeros(len(now.tokens), output.shape[-1])
        return whole.index_copy(0, now.index.to(output.device), output).view(*now.shape, -1)

    def _read_in_full(self, kwargs: dict) -> bool:
        checkpointed = getattr(self.layer, "gradient_checkpointing", False) and self.layer.training
        asked = any(kwargs.get(key) not in (None, False) for key in _ASKS_FOR_MORE)
        return checkpointed or asked or getattr(text_config(self.model), "output_hidden_states", False)


def _works_by_row(mlp: nn.Module) -> bool:
    """Whether it is a plain MLP by its name, without experts or convolutions (weights of more dimensions) or dropout.

    Dropout would be another draw on fewer rows. Wrappers, of quantization or sharding too, have other names.
    """
    linear = all(parameter.dim() <= 2 for parameter in mlp.parameters())
    return type(mlp).__name__.endswith("MLP") and linear and not any(map(_drops, mlp.modules()))


def _used_once(model: nn.Module, mlp: nn.Module) -> bool:
    """Whether the MLP is in one place: layers that share one are not through with it at the first call."""
    return sum(module is mlp for _, module in model.named_modules(remove_duplicate=False)) == 1


def _drops(module: nn.Module) -> bool:
    rates = [module.p] if isinstance(module, nn.Dropout) else []
    # of a dropout that is called as a function
    rates += [value for name, value in vars(module).items() if name.endswith("dropout")]
    return any(rates)


def _takes_masks(model: nn.Module) -> bool:
    """Whether the model, or one that it wraps, names the mask: others would compute all logits and never look at it."""
    takers = (module for module in model.modules() if hasattr(module, "get_output_embeddings"))
    return any(_MASK in inspect.signature(type(module).forward).parameters for module in takers)
