"""Which models' losses can be computed from what enters the output head, and scopes in which they are.

What a model does to its logits is found out by giving it logits of our own: a hook on the head puts numbers of all
sizes out, and what the model returns for them shows scales and caps. Anything that is not known is left to the model.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor, nn

from lofit_fast.data.collate import CompletionCollator, on_device
from lofit_fast.data.encode import IGNORED, Encoded
from lofit_fast.models.linear_loss import LONG, FrozenHead, token_log_probs
from lofit_fast.models.row_index import output_head
from lofit_fast.models.trials import rounding, trial_examples, trying
from lofit_fast.patching.architectures import text_config
from lofit_fast.patching.output_head import is_ours
from lofit_fast.patching.placement import device_of, is_dense
from lofit_fast.patching.prepacked import is_replaced

# what configs call a number that logits are multiplied or divided by, and one that caps them
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_scale")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "logit_softcapping", "final_logits_softcapping")
# of the loss, which is computed here
_LABELS, _TARGETS, _COUNT = "labels", "shift_labels", "num_items_in_batch"
# the sizes of the logits that a model is tried with
_SIZES = (1e-2, 1.0, 30.0, 200.0)
# labels in all micro-batches of a trial; a model that takes the number may still ignore it
_SOME = 7


def longest_head(model: nn.Module, rows: Sequence[Encoded], batch_size: int) -> FrozenHead | None:
    """`frozen_head`, where a batch of so many of these rows can have logits that are made in chunks; else None."""
    most = max((sum(label != IGNORED for label in row["labels"]) for row in rows), default=0)
    head = output_head(model)
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or most * batch_size * weight.shape[0] * 4 <= LONG:
        return None
    return frozen_head(model)


def frozen_head(model: nn.Module) -> FrozenHead | None:
    """The model's output head, if its loss is the cross-entropy of a frozen linear map, scaled and capped; else None.

    Tried on a few tokens: the logits that the model makes of given ones, and the loss both ways. No weight, mode or
    random number changes.
    """
    head = output_head(model)
    if head is None or not _is_plain(head):
        return None
    try:
        with trying(model):
            found = _after(model, head)
            if found is None or not _same_loss(model, found):
                return None
    # it needs more than tokens, or cannot run here: it goes on as it is
    except Exception:
        return None
    return found


@contextmanager
def withheld(module: nn.Module) -> Iterator[list[Tensor]]:
    """A scope in which an output head, called in this thread, is given no rows. Yields the list of what it would get.

    Its output is then (..., 0, vocabulary).
    """
    taken: list[Tensor] = []
    thread = threading.get_ident()

    def take(_: nn.Module, args: tuple) -> tuple | None:
        if threading.get_ident() != thread:
            return None
        taken.append(args[0])
        return (args[0][..., :0, :], *args[1:])

    hook = module.register_forward_pre_hook(take)
    try:
        yield taken
    finally:
        hook.remove()


@contextmanager
def chunked_losses(model: nn.Module, head: FrozenHead | None) -> Iterator[None]:
    """A scope in which the loss of a batch with many labels comes from chunks, and its logits are empty.

    head: of `frozen_head`; None leaves all as it is. The loss is the mean of -log p over labelled tokens, or the sum
    over num_items_in_batch, as transformers' own is. Batches that are not `is_long` are the model's. What is added is
    hooks, and all of them go.
    """
    if head is None:
        yield
        return
    losses = _Losses(head)
    # the last to see the batch, and the first to see the output
    hooks = [
        model.register_forward_pre_hook(losses.take, with_kwargs=True),
        model.register_forward_hook(losses.give, prepend=True),
        model.register_forward_hook(losses.drop, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        # what a keyboard's interrupt has ended runs no hooks, and would leave the head without rows
        losses.drop(model, (), None)


class _Losses(threading.local):
    """The forward pass that goes on in a thread: its targets and the scope that withholds the head's rows."""

    def __init__(self, head: FrozenHead) -> None:
        self.head = head
        self.scope = None
        self.taken: list[Tensor] = []
        self.targets: Tensor | None = None
        self.count: Tensor | int | None = None

    def take(self, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        targets = _targets(kwargs)
        if targets is None or not self.head.is_long(targets.numel()):
            return None
        self.targets, self.count = targets, kwargs.get(_COUNT)
        self.scope = withheld(self.head.module)
        self.taken = self.scope.__enter__()
        return args, {name: value for name, value in kwargs.items() if name not in (_LABELS, _TARGETS, _COUNT)}

    def give(self, _: nn.Module, args: tuple, output):
        if self.scope is None:
            return None
        (hidden,), targets = self.taken, self.targets
        loss = mean_loss(hidden, self.head, targets, self.count)
        return type(output)(**{"loss": loss, **{key: value for key, value in output.items() if key != "loss"}})

    def drop(self, module: nn.Module, args: tuple, output: object) -> None:
        scope, self.scope, self.targets, self.taken = self.scope, None, None, []
        if scope is not None:
            scope.__exit__(None, None, None)


def mean_loss(hidden: Tensor, head: FrozenHead, targets: Tensor, count: Tensor | int | None = None) -> Tensor:
    """The cross-entropy of a causal model, a scalar. hidden: (..., N), as many rows as targets.

    targets: int64; (rows,) of kept rows, all with a label, or of other shapes, IGNORED where there is none.
    count: what the sum is divided by; None means the labels. Raises ValueError for another number of rows.
    """
    # counting labels would make the host wait for a device
    all_labelled = targets.dim() == 1
    hidden, targets = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
    if len(hidden) != len(targets):
        raise ValueError(f"expected {len(targets)} rows at the output head, got {len(hidden)}")
    if not all_labelled:
        keep = (targets != IGNORED).nonzero().flatten()
        hidden, targets = hidden.index_select(0, keep), targets[keep]
    total = -token_log_probs(hidden, head, targets)[0].sum()
    count = len(targets) if count is None else count
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


def _targets(batch: dict) -> Tensor | None:
    """The labels that a forward would take, shifted: of kept rows, or (B, S)."""
    labels, shifted = batch.get(_LABELS), batch.get(_TARGETS)
    if labels is None or shifted is not None:
        return None if labels is None else shifted
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def _is_plain(head: nn.Module) -> bool:
    """Whether it is exactly a linear map of plain frozen numbers that lie somewhere, and nothing hangs on it."""
    hooks = [*head._forward_hooks.values(), *(hook for hook in head._forward_pre_hooks.values() if not is_ours(hook))]
    if type(head) is not nn.Linear or is_replaced(head) or hooks:
        return False
    numbers = [tensor for tensor in (head.weight, head.bias) if tensor is not None]
    return all(is_dense(t) and not t.requires_grad and t.device.type != "meta" for t in numbers)


def _after(model: nn.Module, head: nn.Linear) -> FrozenHead | None:
    """The head with what the model does to given logits: the first of the config's scales and caps that does that."""
    config = text_config(model)
    scales = [value for name in _SCALES if isinstance(value := getattr(config, name, None), int | float)]
    caps = [value for name in _CAPS if isinstance(value := getattr(config, name, None), int | float)]
    steps = [{}, *({"multiply": value} for value in scales if value), *({"divide": value} for value in scales if value)]
    batch = on_device(CompletionCollator(0, logits="all")(trial_examples(model)), device_of(model))
    batch.pop(_LABELS)
    shown: list[Tensor] = []
    thread = threading.get_ident()

    def show(_: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        # the answers of others are theirs
        if threading.get_ident() != thread:
            return None
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(output.shape, generator=generator).to(output)
        sizes = torch.tensor(_SIZES).repeat(-(-drawn[..., 0].numel() // len(_SIZES)))[: drawn[..., 0].numel()]
        shown.append(drawn * sizes.view(drawn.shape[:-1])[..., None].to(output))
        return shown[-1]

    hook = head.register_forward_hook(show)
    try:
        got = model(**batch, use_cache=False).logits
    finally:
        hook.remove()
    if len(shown) != 1 or got.shape != shown[0].shape:
        return None
    allowed = {"rtol": 8 * torch.finfo(shown[0].dtype).eps, "atol": torch.finfo(shown[0].dtype).eps}
    for step, cap in product(steps, [None, *caps]):
        found = FrozenHead(head, head.weight, head.bias, cap=cap, **step)
        if torch.allclose(found.after(shown[0]).double(), got.double(), **allowed):
            return found
    return None


def _same_loss(model: nn.Module, head: FrozenHead) -> bool:
    """Whether the loss from what enters the head is the model's own."""
    batch = on_device(CompletionCollator(0, logits="all")(trial_examples(model)), device_of(model))
    own = [(count, loss) for count in (None, _SOME) if (loss := _own_loss(model, batch, count)) is not None]
    targets = _targets(batch)
    batch.pop(_LABELS)
    with withheld(head.module) as taken:
        model(**batch, use_cache=False)
    if len(taken) != 1:
        return False
    allowed = {"rtol": rounding(model), "atol": rounding(model)}
    losses = ((mean_loss(taken[0], head, targets, count).double(), loss.double()) for count, loss in own)
    return all(torch.allclose(ours, theirs, **allowed) for ours, theirs in losses)


def _own_loss(model: nn.Module, batch: dict, count: int | None) -> Tensor | None:
    """The model's, of so many labels in all micro-batches; None from a model that takes no such number."""
    given = {} if count is None else {_COUNT: count}
    try:
        return model(**batch, **given, use_cache=False).loss
    except TypeError:
        if count is None:
            raise
        return None
