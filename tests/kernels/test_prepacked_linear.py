"""Products with prepacked weights: against float64, in both directions, compiled, and once more differentiated."""

import copy
import pickle
import weakref

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from lofit_kernels.prepacked_linear import PrepackedWeight, is_taken, prepacked_linear, refusal
from tests.accuracy_rule import check

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no prepacked weights here: {refusal()}")
N, K = 40, 56


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def held():
    weight = torch.nn.Parameter(draw(N, K, seed=1), requires_grad=False)
    held = PrepackedWeight(weight)
    yield held
    held.close()


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


def test_compiled_products_have_forward_derivatives(held):
    def product(x):
        return prepacked_linear(x, held) if is_taken(x, held) else linear(x, held.weight)

    x = draw(3, K)
    compiled = torch.compile(product, backend="aot_eager")
    compiled(x)
    tangent = torch.compile(lambda x: torch.func.jvp(product, (x,), (x,))[1], backend="aot_eager")(x)
    torch.testing.assert_close(tangent, linear(x, held.weight))
    with torch.autograd.forward_ad.dual_level():
        y = compiled(torch.autograd.forward_ad.make_dual(x, x))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, linear(x, held.weight))


def doubled(weight):
    with torch.no_grad():
        weight.mul_(2)


def doubled_unseen(weight):
    weight.data *= 2


def doubled_by_numpy(weight):
    numbers = weight.numpy()
    numbers *= 2


def given_others(weight):
    weight.data = 2 * weight.data


@pytest.mark.parametrize("change", [doubled, doubled_unseen, doubled_by_numpy, given_others])
def test_a_weight_that_has_changed_is_refused(held, change):
    x = draw(2, K)
    assert is_taken(x, held)
    prepacked_linear(x, held)
    change(held.weight)
    assert held.has_changed() and not is_taken(x, held)
    with pytest.raises(RuntimeError, match=r"changed after it was laid out for oneDNN: .* before the scope of prepack"):
        prepacked_linear(x, held)


def test_numbers_that_are_nan_are_themselves(held):
    held.weight.data[0] = float("nan")
    prepacked_linear(draw(2, K), held)
    assert not held.has_changed()


def test_one_that_changes_before_it_is_used_is_taken_as_it_is_then(held):
    with torch.no_grad():
        held.weight.mul_(2)
    torch.testing.assert_close(prepacked_linear(draw(2, K), held), linear(draw(2, K), held.weight))


def test_after_its_scope_it_is_refused_and_its_layouts_are_gone(held):
    x = draw(2, K).requires_grad_()
    prepacked_linear(x, held).sum().backward()
    layouts = list(map(weakref.ref, held._packed.values()))
    held.close()
    assert len(layouts) == 2 and not any(layout() is not None for layout in layouts)
    assert not is_taken(x, held)
    with pytest.raises(RuntimeError, match="after its scope had ended"):
        prepacked_linear(x, held)


def test_copies_and_pickles_hold_none(held):
    assert copy.deepcopy(held) is None and pickle.loads(pickle.dumps(held)) is None


@pytest.mark.parametrize("shift", [draw(2 * N)[::2], draw(N, 3)[:, 1], draw(1).expand(N)])
def test_a_shift_may_lie_anyhow(held, shift):
    x = draw(3, K)
    torch.testing.assert_close(prepacked_linear(x, held, shift), linear(x, held.weight, shift))


def test_what_is_no_plain_float32_matrix_or_is_looked_at_is_left_to_plain_products(held):
    x, shift = draw(3, K), draw(N)
    assert is_taken(x, held, shift) and is_taken(torch.nn.Parameter(x), held)
    jagged = torch.nested.nested_tensor([draw(2, K), draw(3, K)], layout=torch.jagged)
    for rows in (jagged, x.to_sparse(), x.to_mkldnn(), x.double(), x.bfloat16(), draw(3, 2 * K), x[0, 0]):
        assert not is_taken(rows, held)
    for other in (shift.double(), draw(1)):
        assert not is_taken(x, held, other)
    taken = []

    def asked(x):
        taken.append(is_taken(x, held))
        return linear(x, held.weight)

    torch.func.jvp(asked, (x,), (x,))
    torch.func.vmap(asked)(x)
    torch.func.grad(lambda x: asked(x).sum())(x)
    torch.jit.trace(asked, x, check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        asked(torch.autograd.forward_ad.make_dual(x, x))
    with FlopCounterMode(display=False):
        asked(x)
    assert taken == 6 * [False] and is_taken(x, held)


def test_the_defaults_of_dtype_and_device_do_not_matter():
    found = []
    for device, dtype in (("meta", torch.float32), ("cpu", torch.float64)):
        refusal.cache_clear()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                found.append(refusal())
        finally:
            torch.set_default_dtype(before)
    assert found == [None, None]
