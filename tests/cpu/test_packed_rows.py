"""Between a packed row and padded ones: every token to its places, every gradient back."""

import torch

from lofit_fast.cpu.packed_rows import gather, spread

# two shared tokens, then three of one example and one of the other
ROWS = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 5, -1, -1]])
PLACES = torch.tensor([2, 3, 4, 7])
TOKENS = 6


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def test_spread_puts_every_token_in_its_places():
    packed = drawn(1, 3, TOKENS, 2)
    padded = spread(packed, ROWS, PLACES)
    assert padded.shape == (2, 3, 5, 2)
    for row, column in (ROWS >= 0).nonzero().tolist():
        assert padded[row, :, column].equal(packed[0, :, ROWS[row, column]])


def test_gather_undoes_spread():
    packed = drawn(1, 3, TOKENS, 2)
    assert gather(spread(packed, ROWS, PLACES), ROWS, PLACES, TOKENS).equal(packed.transpose(1, 2))


def test_gradients_of_spread_and_gather():
    real = (ROWS >= 0)[:, None, :, None]

    def read(packed):
        # as attention does: nothing of a place without a token reaches the result
        return spread(packed, ROWS, PLACES) * real

    def both(packed):
        padded = spread(packed, ROWS, PLACES) * real
        return gather(padded.cumsum(2) ** 2, ROWS, PLACES, TOKENS)

    assert torch.autograd.gradcheck(read, drawn(1, 3, TOKENS, 2))
    assert torch.autograd.gradcheck(both, drawn(1, 3, TOKENS, 2))
    assert torch.autograd.gradcheck(lambda padded: gather(padded, ROWS, PLACES, TOKENS), drawn(2, 3, 5, 2))
