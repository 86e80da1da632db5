"""RepE (arXiv:2310.01405): reading vectors, added to the residual stream of some layers.

A layer's vector is the first principal component of the differences between its output at the last token of a right
and of a wrong answer. The paper flips each pair at random, so that the differences' mean is no part of what is centred
away; here they are not centred, which is the same in expectation and needs no draw. Its sign makes right answers
project further. Coefficients are in deviations of the layer's output along the vector, so that one suits models whose
residual streams differ in size; the paper gives them in absolute units, per model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.peers.edits import Edits
from lofit_fast.data.encode import encode_pair, pad_token_id
from lofit_fast.data.lengths import longest_first
from lofit_fast.data.padding import padded
from lofit_fast.evaluation.choices import check_room
from lofit_fast.patching.architectures import decoder_layers
from lofit_fast.patching.modes import eval_mode
from lofit_fast.tasks.contrast import Contrast

_BATCH = 16


class Shift(nn.Module):
    """h -> h + vector at every position."""

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        self.register_buffer("vector", vector)

    def forward(self, h: Tensor) -> Tensor:
        """h: (B, S, N)."""
        return (h + self.vector).to(h.dtype)


def reading_vectors(right: Tensor, wrong: Tensor) -> Tensor:
    """sigma * u of every layer, (layers, N) float32. right, wrong: (n, layers, N), row i of both from one prompt."""
    right, wrong = right.double().transpose(0, 1), wrong.double().transpose(0, 1)
    first = torch.linalg.svd(right - wrong, full_matrices=False).Vh[:, 0]
    towards = ((right - wrong).mean(1) * first).sum(1)
    unit = torch.where(towards < 0, -1.0, 1.0)[:, None] * first
    sigma = (torch.cat((right, wrong), 1) @ unit[..., None]).std((1, 2), correction=0)
    return (sigma[:, None] * unit).float()


@torch.no_grad()
def last_states(model: nn.Module, tokenizer, contrasts: Sequence[Contrast]) -> tuple[Tensor, Tensor]:
    """Every layer's output at the last token of the right and of the wrong answers: two of (n, layers, N) float32.

    Raises ValueError for no contrasts, or an answer too long for the model's context.
    """
    if not contrasts:
        raise ValueError("reading vectors need at least one contrast, got none")
    rows = [encode_pair(tokenizer, c.prompt, answer) for c in contrasts for answer in (c.right, c.wrong)]
    check_room(model, rows, 0)
    layers, states = decoder_layers(model), {}
    device = next(model.parameters()).device
    taken: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: taken.append(_hidden(out))) for layer in layers]
    try:
        with eval_mode(model):
            for batch in longest_first([len(row) for row in rows], _BATCH, "states", False):
                ids, mask = (x.to(device) for x in padded([rows[i] for i in batch], pad_token_id(tokenizer)))
                taken.clear()
                # one position of logits, which nobody reads
                model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
                last = mask.sum(1) - 1
                at_last = [h[torch.arange(len(batch)), last.to(h.device)].float().cpu() for h in taken]
                states |= dict(zip(batch, torch.stack(at_last, 1), strict=True))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(torch.stack([states[i] for i in range(which, len(rows), 2)]) for which in (0, 1))


def make(
    model: nn.Module,
    tokenizer,
    contrasts: Sequence[Contrast],
    *,
    seed: int = 42,
    coefficient: float = 1.0,
    span: tuple[float, float] = (0.25, 0.75),
) -> Edits:
    """N numbers per chosen layer.

    coefficient: deviations to move along each vector. span: from which to which share of the model's depth layers are
    chosen; (0, 1) is all of them. seed: of nothing.
    Raises ValueError for a span without a layer, or from `last_states`.
    """
    layers = decoder_layers(model)
    chosen = range(round(span[0] * len(layers)), round(span[1] * len(layers)))
    if not 0 <= span[0] < span[1] <= 1 or not chosen:
        raise ValueError(f"expected a span of the depth with a layer in it, like (0.25, 0.75), got {span}")
    vectors = coefficient * reading_vectors(*last_states(model, tokenizer, contrasts))
    return Edits(model, [(layers[n], Shift(vectors[n])) for n in chosen])


def _hidden(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
