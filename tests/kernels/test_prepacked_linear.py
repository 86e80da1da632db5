"""Products with prepacked weights: against float64, in both directions, compiled, and once more differentiated."""

import copy
import io

import pytest
import torch
from torch.nn.functional import linear

from lofit_kernels.prepacked_linear import PrepackedWeight, prepacked_linear, refusal
from tests.accuracy_rule import check

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no prepacked weights here: {refusal()}")
N, K = 40, 56


@pytest.fixture
def held():
    weight = torch.nn.Parameter(draw(N, K, seed=1), requires_grad=False)
    held = PrepackedWeight(weight)
    yield held
    held.close()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(product, x, grad):
    """(y, dx) of a product of x."""
    x = x.clone().requires_grad_()
    y = product(x)
    return y.detach(), torch.autograd.grad(y, x, grad)[0]


@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (2, 3), (0,)])
@pytest.mark.parametrize("bias", [False, True])
def test_both_directions_are_as_right_as_a_plain_product(held, shape, bias):
    x, grad, shift = draw(*shape, K, seed=2), draw(*shape, N, seed=3), draw(N, seed=4) if bias else None
    weight = held.weight
    got = both(lambda x: prepacked_linear(x, held, shift), x, grad)
    wide = None if shift is None else shift.double()
    exact = both(lambda x: linear(x, weight.double(), wide), x.double(), grad.double())
    # the same sums in other orders
    eager = [(linear(x[..., k], weight[:, k], shift), grad[..., n] @ weight[n]) for k, n in orders(4)]
    for one, reference, others in zip(got, exact, zip(*eager, strict=True), strict=True):
        assert one.dtype == torch.float32
        check(one, reference, *others)


def orders(count):
    """Permutations of a product's inputs and outputs."""
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randperm(size, generator=generator) for size in (K, N)) for _ in range(count)]


def test_gradients_of_gradients_are_those_of_a_plain_product(held):
    x = draw(5, K, seed=2).requires_grad_()

    def curved(y):
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    got, expected = curved(prepacked_linear(x, held)), curved(linear(x, held.weight))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_it_compiles_whole(held):
    x, grad = draw(9, K, seed=2), draw(9, N, seed=3)
    compiled = torch.compile(lambda x: prepacked_linear(x.relu(), held), fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        both(compiled, x, grad), both(lambda x: prepacked_linear(x.relu(), held), x, grad), strict=True
    ):
        assert torch.equal(got, expected)


def test_a_weight_that_has_changed_is_refused(held):
    prepacked_linear(draw(2, K), held)
    with torch.no_grad():
        held.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"changed after it was laid out for oneDNN: .* before the scope of prepack"):
        prepacked_linear(draw(2, K), held)


def test_one_that_changes_before_it_is_used_is_taken_as_it_is_then(held):
    with torch.no_grad():
        held.weight.mul_(2)
    torch.testing.assert_close(prepacked_linear(draw(2, K), held), linear(draw(2, K), held.weight))


def test_after_its_scope_and_in_a_pickle_it_is_refused(held):
    with pytest.raises(TypeError, match="laid out for oneDNN: save it after"):
        torch.save(held, io.BytesIO())
    held.close()
    with pytest.raises(RuntimeError, match="after its scope had ended"):
        prepacked_linear(draw(2, K), held)


def test_a_copy_has_a_weight_of_its_own_and_ends_with_it(held):
    copied = copy.deepcopy(held)
    with torch.no_grad():
        copied.weight.mul_(2)
    x = draw(3, K)
    torch.testing.assert_close(prepacked_linear(x, copied), 2 * prepacked_linear(x, held))
    held.close()
    with pytest.raises(RuntimeError, match="after its scope had ended"):
        prepacked_linear(x, copied)
