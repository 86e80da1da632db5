"""LoReFT (arXiv:2404.03592, equation 2): h + R^T (W h + b - R h) at the first and last tokens of the prompt.

R (r, N) has orthonormal rows, W (r, N) and b (r,) are free: inside the r-dimensional subspace of R's rows, h is
replaced by what W h + b says.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from benchmarks.peers.edits import Edits, seeded
from benchmarks.peers.positions import PromptEdges
from lofit_fast.patching.architectures import decoder_layers, text_config


class LowRankEdit(nn.Module):
    """The edit of one layer's hidden states, the same at all its positions."""

    # scoring must run prompts whole and each by itself, see `choices.score_choices`
    depends_on_prompt = True

    def __init__(self, width: int, rank: int, edges: PromptEdges) -> None:
        super().__init__()
        rotation = nn.Linear(width, rank, bias=False)
        nn.init.orthogonal_(rotation.weight)
        # without the trivialization, which would keep an N x N matrix per layer; the signs on the parameter's diagonal
        # get no gradient and must not decay
        self.rotation = orthogonal(rotation, orthogonal_map="householder", use_trivialization=False)
        self.source = nn.Linear(width, rank)
        self.edges = edges

    def forward(self, h: Tensor) -> Tensor:
        """h: (B, S, N)."""
        mask = self.edges.mask
        if mask is None:
            return h
        mask = mask.to(h.device)
        rotation = self.rotation.weight
        rows = h[mask].to(rotation.dtype)
        edited = rows + (self.source(rows) - rows @ rotation.T) @ rotation
        return h.masked_scatter(mask[..., None], edited.to(h.dtype))


class Loreft(Edits):
    """Edits, and the hook that tells them where the prompts are."""

    takes_packed_rows = False

    def __init__(self, model: nn.Module, layers: Sequence[int] | None, rank: int, first: int, last: int) -> None:
        self._edges = PromptEdges(model, first, last)
        try:
            width, blocks = text_config(model).hidden_size, decoder_layers(model)
            chosen = range(len(blocks)) if layers is None else layers
            super().__init__(model, [(blocks[n], LowRankEdit(width, rank, self._edges)) for n in chosen])
        except BaseException:
            self._edges.remove()
            raise

    def unpatch(self) -> nn.Module:
        """Take the edits and the hook out; what was trainable is again."""
        self._edges.remove()
        return super().unpatch()


def make(
    model: nn.Module,
    *,
    seed: int = 42,
    rank: int = 4,
    positions: int = 7,
    layers: Sequence[int] | None = None,
) -> Loreft:
    """2 r N + r parameters per layer.

    positions: how many tokens at the beginning of the prompt, and again at its end. layers: which decoder layers'
    outputs; None means all. seed: of R, W and b, which do not start from the base model.
    Raises ValueError for a rank above the hidden size.
    """
    width = text_config(model).hidden_size
    if not 1 <= rank <= width:
        raise ValueError(f"expected a rank from 1 to the hidden size {width}, got {rank}")
    with seeded(seed):
        return Loreft(model, layers, rank, positions, positions)
