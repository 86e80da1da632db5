"""What a head knows of the truth: its output on right and wrong answers, and linear probes that tell the two apart.

All probes of a kind are fitted at once, as a batch of small Newton problems in torch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lofit_fast.data.encode import check_unlike, encode_pair, pad_token_id
from lofit_fast.data.lengths import longest_first
from lofit_fast.data.padding import padded
from lofit_fast.evaluation.choices import check_room
from lofit_fast.evaluation.finite_logits import check_activations
from lofit_fast.models.vocabulary import check_ids, check_padding
from lofit_fast.patching.architectures import find_projections
from lofit_fast.patching.patched import evaluating
from lofit_fast.patching.placement import device_of
from lofit_fast.patching.tensor_parallel import is_tensor_parallel
from lofit_fast.tasks.contrast import Contrast
from lofit_fast.torch_defaults import on_the_cpu

SPLITS = 5
_ITERATIONS, _HALVINGS = 50, 20
# of the features that are fitted at a time, in float64
_CHUNK_BYTES = 2**27


@on_the_cpu
@torch.no_grad()
def head_activations(
    model: nn.Module, tokenizer, contrasts: Sequence[Contrast], *, batch_size: int = 16, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """z, the input of every output projection, at the last token of each answer, and whether the answer is right.

    Returns ((2n, layers, heads, D) float32, (2n,) bool), both on the CPU, for n contrasts: rows 2i and 2i + 1 are the
    right and the wrong answer of contrast i. Layers are numbered as in the model; where one has no attention or fewer
    heads than others, the rest is NaN. No end-of-sequence token follows an answer.
    Raises ValueError for a tensor-parallel model, no contrasts, an answer without tokens or too long for the model's
    context, a contrast of two answers with the same tokens, or a model whose layers have heads of different sizes;
    FloatingPointError for activations that are not finite.
    """
    if not contrasts:
        raise ValueError("activations need at least one contrast, got none")
    if is_tensor_parallel(model):
        raise ValueError(
            "cannot read the heads of a tensor-parallel model, of which each process has some: expected a model that "
            "this process holds whole"
        )
    projections = find_projections(model)
    sizes = {p.head_dim for p in projections}
    if len(sizes) > 1:
        raise ValueError(f"expected heads of one size in all layers, got head_dim {sorted(sizes)}")
    encoded = [encode_pair(tokenizer, c.prompt, answer) for c in contrasts for answer in (c.right, c.wrong)]
    for number, (right, wrong) in enumerate(zip(encoded[::2], encoded[1::2], strict=True), start=1):
        check_unlike(right, wrong, f"contrast {number}: the right and the wrong answer")
    check_ids(model, encoded, "answer")
    check_padding(model, pad_token_id(tokenizer), encoded)
    check_room(model, encoded, 0)
    shape = (len(encoded), projections[-1].layer + 1, max(p.n_heads for p in projections), *sizes)
    activations = torch.full(shape, math.nan, dtype=torch.float32)
    device = device_of(model)
    lengths = [len(row) for row in encoded]
    with evaluating(model), _LastInputs({p.layer: p.module for p in projections}) as inputs:
        for rows in longest_first(lengths, batch_size, "activations", progress):
            ids, mask = (x.to(device) for x in padded([encoded[i] for i in rows], pad_token_id(tokenizer)))
            inputs.last = mask.sum(1) - 1
            # one position of logits, which nobody reads
            model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
            for p in projections:
                z = inputs.taken.pop(p.layer).float().cpu()
                # NaN would say that the head is not there
                check_activations(z, p.layer)
                activations[rows, p.layer, : p.n_heads] = z.view(len(rows), p.n_heads, p.head_dim)
    return activations, torch.tensor([True, False]).repeat(len(contrasts))


def probe_accuracy(
    activations: Tensor,
    labels: Tensor,
    *,
    splits: int = SPLITS,
    l2: float = 1.0,
    seed: int = 42,
    questions: Sequence[Hashable] | None = None,
    progress: bool = False,
) -> Tensor:
    """Held-out accuracy of a logistic probe per head: (layers, heads) float32. ITI's scores (arXiv:2306.03341).

    activations, labels: as `head_activations` gives them, the two answers to a question in consecutive rows. Questions
    are dealt into `splits` at random; every answer is judged by a probe fitted to the other splits, on features brought
    to mean 0 and deviation 1 there. The share of right judgements is taken over all answers. Heads the model does not
    have score minus infinity.
    questions: what each two rows are of, their prompt say: a question that comes more than once is in one split, or a
    probe would know it by heart. None: each is another.
    Raises ValueError for shapes that do not fit, or fewer questions than splits.
    """
    groups = _groups(labels, questions)
    heads = _checked(activations, labels, groups, splits).flatten(1, 2).transpose(0, 1)
    accuracy = _held_out_accuracy(heads, labels, groups, splits, l2, seed, "probing heads", progress)
    return accuracy.view(activations.shape[1:3])


def layer_probe_accuracy(
    activations: Tensor,
    labels: Tensor,
    *,
    splits: int = SPLITS,
    l2: float = 1.0,
    seed: int = 42,
    questions: Sequence[Hashable] | None = None,
    progress: bool = False,
) -> Tensor:
    """As `probe_accuracy`, with one probe per layer on all its heads side by side: (layers,) float32."""
    groups = _groups(labels, questions)
    layers = _checked(activations, labels, groups, splits).flatten(2).transpose(0, 1)
    # a layer with fewer heads than others is still a layer
    present = ~layers.isnan().all(2).all(1)
    layers = layers.nan_to_num().where(present[:, None, None], math.nan)
    return _held_out_accuracy(layers, labels, groups, splits, l2, seed, "probing layers", progress)


def probing_layer_scores(layer_accuracy: Tensor, head_accuracy: Tensor) -> Tensor:
    """Heads of the best layers first, and within a layer the best heads: (layers, heads) float32.

    layer_accuracy: (layers,); head_accuracy: (layers, heads), minus infinity for heads that are not there. A head's
    score is the number of layers that come after its own plus half its accuracy. So the top heads are all those of the
    best layers, and of the last layer that is needed its best heads. Of equally good layers the lower comes first.
    """
    best_first = layer_accuracy.argsort(descending=True, stable=True)
    after = torch.empty_like(head_accuracy[:, 0])
    after[best_first] = torch.arange(len(best_first) - 1, -1, -1).to(after)
    return after[:, None] + head_accuracy / 2


def fit_probes(features: Tensor, labels: Tensor, l2: float = 1.0) -> tuple[Tensor, Tensor]:
    """Logistic regressions, all at once: weights (P, F) and intercepts (P,) that minimise

        sum_n log(1 + exp(-s_n (x_n w + c))) + l2 / 2 |w|^2,    s_n = 1 where the label is true, -1 where not.

    features: (P, N, F) for P problems, floating point. labels: (N,) bool. Newton's method with halved steps, which
    ends where no component of the gradient exceeds 1e-6 N in float64 (1e-3 N in float32).
    Raises ValueError for l2 <= 0, without which separable data have no optimum.
    """
    if not l2 > 0:
        raise ValueError(f"expected l2 > 0, got {l2}")
    # in the space that the rows span, where the optimum lies: exact, and small where there are few rows
    basis = torch.linalg.qr(features.mT).Q if features.shape[2] > features.shape[1] else None
    x = features if basis is None else features @ basis
    x = torch.cat((x, x.new_ones(*x.shape[:2], 1)), 2)
    sign = torch.where(labels, 1.0, -1.0).to(x)
    penalty = torch.full((x.shape[2],), l2, dtype=x.dtype, device=x.device)
    penalty[-1] = 0.0
    w = x.new_zeros(x.shape[0], x.shape[2])

    def objective(at: Tensor) -> Tensor:
        margins = sign * (x @ at[..., None])[..., 0]
        return -nn.functional.logsigmoid(margins).sum(1) + (penalty * at * at).sum(1) / 2

    enough = (1e-6 if x.dtype == torch.float64 else 1e-3) * x.shape[1]
    value = objective(w)
    for _ in range(_ITERATIONS):
        p = torch.sigmoid((x @ w[..., None])[..., 0])
        gradient = ((p - (sign > 0).to(p))[:, None] @ x)[:, 0] + penalty * w
        if gradient.abs().max() <= enough:
            break
        hessian = (x * (p * (1 - p))[..., None]).mT @ x + torch.diag(penalty)
        # the intercept has no penalty, and no curvature either where every answer is certain
        hessian[:, -1, -1] += 1e-9 * x.shape[1]
        step = torch.linalg.solve(hessian, gradient)
        promised = (gradient * step).sum(1)
        share = torch.ones_like(value)
        for _ in range(_HALVINGS):
            reached = objective(w - share[:, None] * step)
            too_far = ~(reached <= value - 1e-4 * share * promised)
            if not too_far.any():
                break
            share = torch.where(too_far, share / 2, share)
        better = reached < value
        w = torch.where(better[:, None], w - share[:, None] * step, w)
        value = torch.where(better, reached, value)
    weights = w[:, :-1]
    return (weights if basis is None else (basis @ weights[..., None])[..., 0]), w[:, -1]


def split_of(n_questions: int, splits: int, seed: int) -> Tensor:
    """The split of every question, (n,) int64: sizes differ by one at most, drawn from the seed."""
    draw = torch.Generator().manual_seed(seed)
    return torch.arange(n_questions).remainder(splits)[torch.randperm(n_questions, generator=draw)]


class _LastInputs(ExitStack):
    """A scope in which every projection leaves its input at the row's last token in `taken`, (B, K) per layer.

    Of forwards of the thread that has entered it.
    """

    def __init__(self, projections: dict[int, nn.Module]) -> None:
        super().__init__()
        self.taken: dict[int, Tensor] = {}
        self.last: Tensor | None = None
        self.thread = threading.get_ident()
        for layer, module in projections.items():
            self.callback(module.register_forward_pre_hook(self._taker(layer)).remove)

    def _taker(self, layer: int):
        def take(_, inputs) -> None:
            if threading.get_ident() != self.thread:
                return
            z = inputs[0]
            last = self.last.to(z.device)
            self.taken[layer] = z[torch.arange(len(last), device=z.device), last]

        return take


def _groups(labels: Tensor, questions: Sequence[Hashable] | None) -> Tensor:
    """(n,) int64: the number of the question that every two rows are of, in the order in which they come."""
    every = range(len(labels) // 2) if questions is None else questions
    if len(every) != len(labels) // 2:
        raise ValueError(f"expected a question for every two of {len(labels)} rows, got {len(every)}")
    numbers = {question: number for number, question in enumerate(dict.fromkeys(every))}
    return torch.tensor([numbers[question] for question in every], dtype=torch.int64)


def _held_out_accuracy(
    features, labels, groups: Tensor, splits: int, l2: float, seed: int, label: str, progress: bool
) -> Tensor:
    """(P,) float32 on the CPU for features (P, 2n, F); minus infinity where they are NaN."""
    labels = labels.to(features.device)
    dealt = split_of(int(groups.max()) + 1, splits, seed)
    split = dealt[groups].repeat_interleave(2).to(features.device)
    accuracy = torch.full((len(features),), -math.inf, dtype=torch.float32)
    known = (~features.isnan().any(2).any(1)).nonzero()[:, 0]
    with tqdm(total=splits * len(known), desc=label, disable=not progress, leave=False) as bar:
        for chunk in known.split(max(1, _CHUNK_BYTES // (8 * features[0].numel()))):
            part = features[chunk].double()
            hits = torch.zeros(len(chunk), dtype=torch.int64, device=features.device)
            for held_out in range(splits):
                inside, outside = split != held_out, split == held_out
                mean, spread = (f(part[:, inside], 1, keepdim=True) for f in (torch.mean, torch.std))
                # a feature that never changes tells nothing
                spread = spread.where(spread > 1e-7 * mean.abs(), math.inf)
                standard = (part - mean) / spread
                weights, intercepts = fit_probes(standard[:, inside], labels[inside], l2)
                said = (standard[:, outside] @ weights[..., None])[..., 0] + intercepts[:, None] > 0
                hits += (said == labels[outside]).sum(1)
                bar.update(len(chunk))
            accuracy[chunk.cpu()] = (hits / len(labels)).float().cpu()
    return accuracy


def _checked(activations: Tensor, labels: Tensor, groups: Tensor, splits: int) -> Tensor:
    if activations.dim() != 4 or labels.shape != activations.shape[:1] or len(labels) % 2:
        raise ValueError(
            "expected activations (2n, layers, heads, D) and labels (2n,), got "
            f"{tuple(activations.shape)} and {tuple(labels.shape)}"
        )
    if labels.dtype != torch.bool or (labels[::2] == labels[1::2]).any():
        raise ValueError("expected bool labels, a right and a wrong answer in every two consecutive rows")
    count = len(groups.unique())
    if not 2 <= splits <= count:
        raise ValueError(f"expected splits from 2 to the {count} questions there are, got {splits}")
    return activations
