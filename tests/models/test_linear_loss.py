"""Log-probabilities in chunks: against float64, with caps, scales and biases, in every dtype, without all logits."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lofit_fast.models import linear_loss
from lofit_fast.models.linear_loss import FrozenHead, token_log_probs

ROWS, N, VOCAB = 37, 24, 101
AFTER = [{}, {"multiply": 0.25}, {"divide": 8.0}, {"cap": 3.0}, {"multiply": 2.0, "cap": 1.5}]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """8 rows a chunk, the last one ragged."""
    monkeypatch.setattr(linear_loss, "CHUNK", 8 * VOCAB * 4)


def drawn(dtype, bias, **after):
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(rows, N, generator=generator).to(dtype) for rows in (ROWS, VOCAB))
    shift = torch.randn(VOCAB, generator=generator).to(dtype) if bias else None
    targets = torch.randint(VOCAB, (ROWS,), generator=generator)
    weights = torch.randn(ROWS, generator=generator)
    return hidden.requires_grad_(), FrozenHead(None, weight, shift, **after), targets, weights


def plainly(hidden, head, targets):
    """As transformers does it: all logits, in the model's dtype, then float32."""
    logits = head.after(nn.functional.linear(hidden, head.weight, head.bias))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -nn.functional.cross_entropy(wide, targets, reduction="none")


def both(log_probs, hidden, weights):
    (gradient,) = torch.autograd.grad((log_probs * weights.to(log_probs.dtype)).sum(), hidden)
    return log_probs.detach(), gradient


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("after", AFTER, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_loss_is_as_accurate_as_all_logits(dtype, after, bias):
    hidden, head, targets, weights = drawn(dtype, bias, **after)
    exact_head = FrozenHead(None, head.weight.double(), None if head.bias is None else head.bias.double(), **after)
    wide = hidden.detach().double().requires_grad_()
    exact = both(plainly(wide, exact_head, targets), wide, weights)
    plain = both(plainly(hidden, head, targets), hidden, weights)
    ours = both(token_log_probs(hidden, head, targets)[0], hidden, weights)
    for got, eager, truth in zip(ours, plain, exact, strict=True):
        assert got.dtype == eager.dtype
        ulp = torch.finfo(got.dtype).eps * truth.abs().max()
        assert (got.double() - truth).abs().max() <= max(2 * (eager.double() - truth).abs().max(), ulp)


@pytest.mark.slow
def test_linear_loss_in_float64_is_the_derivative():
    hidden, head, targets, _ = drawn(torch.float64, True, multiply=0.5, cap=2.0)
    assert torch.autograd.gradcheck(lambda h: token_log_probs(h, head, targets)[0], (hidden,))


def test_linear_loss_of_watched_rows():
    hidden, head, targets, _ = drawn(torch.float32, False, cap=4.0)
    log_probs, watched = token_log_probs(hidden, head, targets, watch=True)
    logits = head.after(hidden @ head.weight.T).detach()
    probabilities = logits.softmax(1)
    torch.testing.assert_close(watched.entropy, -(probabilities * probabilities.log()).sum(1))
    torch.testing.assert_close(watched.mean_logits, logits.mean(1))
    assert watched.is_top1.equal(logits.argmax(1) == targets)
    assert log_probs.requires_grad and not watched.entropy.requires_grad
    assert token_log_probs(hidden, head, targets)[1] is None


def test_linear_loss_of_no_gradient_keeps_nothing():
    hidden, head, targets, _ = drawn(torch.float32, False)
    with torch.no_grad():
        assert not token_log_probs(hidden, head, targets)[0].requires_grad
    assert not token_log_probs(hidden.detach(), head, targets)[0].requires_grad


class Largest(TorchDispatchMode):
    """The most elements that any tensor of a pass has."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor):
                self.most = max(self.most, one.numel())
        return out


def test_linear_loss_makes_no_more_logits_than_a_chunk():
    hidden, head, targets, weights = drawn(torch.float32, False)
    with Largest() as chunked:
        both(token_log_probs(hidden, head, targets)[0], hidden, weights)
    with Largest() as plain:
        both(plainly(hidden, head, targets), hidden, weights)
    # the weight is larger than a chunk's logits here
    assert (chunked.most, plain.most) == (VOCAB * N, ROWS * VOCAB)


def test_linear_loss_under_autocast():
    hidden, head, targets, weights = drawn(torch.float32, False)
    with torch.autocast("cpu", torch.bfloat16):
        ours = both(token_log_probs(hidden, head, targets)[0], hidden, weights)
        plain = both(plainly(hidden, head, targets), hidden, weights)
    for got, expected in zip(ours, plain, strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() <= 1e-2 * expected.norm()


def test_linear_loss_is_chunked_from_a_count_on():
    head = FrozenHead(None, torch.empty(262_144, 1, device="meta"))
    assert linear_loss.LONG == 2**30
    assert not head.is_long(1024) and head.is_long(1025)


def test_no_rows_have_no_log_probs():
    hidden, head, targets, _ = drawn(torch.float32, True)
    none = hidden[:0]
    got, watched = token_log_probs(none, head, targets[:0], watch=True)
    assert got.shape == (0,) and all(len(numbers) == 0 for numbers in watched)
    assert torch.autograd.grad(got.sum(), hidden)[0].count_nonzero() == 0
