"""The four custom ops under torch.library's own checks, and compiled whole with any number of tokens."""

from itertools import product

import pytest
import torch

from lofit_kernels import head_affine, head_affine_linear, ops
from lofit_kernels.answers import Path
from lofit_kernels.dispatch import NUMBERED_PATHS
from tests.accuracy_rule import check
from tests.ordinary_sample import crossed, some_now

H, D, N = 4, 8, 12
K = H * D

# numbers of paths, as the forward op gives them to the backward op
PASS, FOLD = (NUMBERED_PATHS.index(Path(form, "aten", "vendor")) for form in ("pass", "fold"))

# heads of (scale, offset)
HEADS = {
    "scale": ([0, 1, 2, 3], None),
    "scale_some": ([1, 2], None),
    "offset": (None, [0, 1, 2, 3]),
    "offset_some": (None, [3]),
    "both": ([0, 2], [1]),
    "no_heads": ([], []),
}
FORMS = [(case, form) for case, (s, _) in HEADS.items() for form in (("fold",) if s is None else ("pass", "delta"))]


def vectors(case: str, grad: bool = True) -> list:
    """scale, scale_heads, offset, offset_heads."""
    out = []
    for heads in HEADS[case]:
        out += (
            [None, None]
            if heads is None
            else [torch.randn(len(heads), D, requires_grad=grad), torch.tensor(heads, dtype=torch.int64)]
        )
    return out


def projection(dtype=torch.float32, grad: bool = True) -> list:
    """z, weight, bias."""
    return [torch.randn(*size).to(dtype).requires_grad_(grad) for size in ((2, 3, K), (N, K), (N,))]


def passed(op, args) -> bool:
    return set(torch.library.opcheck(op, tuple(args)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("case, form", some_now(FORMS, ("both", "delta"), ("offset_some", "fold"), ("scale", "pass")))
def test_affine_linear_opcheck(case, form):
    assert passed(ops.affine_linear, [*projection(), *vectors(case), None, form, "aten"])


@pytest.mark.parametrize("form", ["pass", "delta"])
def test_affine_linear_opcheck_in_16_bits(form):
    assert passed(ops.affine_linear, [*projection(torch.bfloat16), *vectors("both"), None, form, "aten"])


@pytest.mark.parametrize("bias", [False, True])
def test_affine_linear_opcheck_folded(bias):
    z, weight, b = projection(grad=False)
    args = [z, weight, b if bias else None, *vectors("offset", grad=False), torch.randn(N), "fold", "aten"]
    assert passed(ops.affine_linear, args)


# of what gradients are asked for: z, weight, bias, scale, offset, folded
NEEDS = ["zwbso-", "z--so-", "----o-", "--b---", "z-----", "---s--", "-w----", "z-bs-f", "-----f"]


# in the ordinary run all, some, and those of the vectors alone; slow: the others, one by one
@pytest.mark.parametrize(
    "case, needs",
    some_now(
        list(product(["both", "no_heads"], NEEDS)),
        *product(["both"], NEEDS[:2] + NEEDS[7:8]),
        ("no_heads", "zwbso-"),
        ("both", "---s--"),
    ),
)
def test_affine_linear_backward_opcheck(case, needs):
    asked = [letter != "-" for letter in needs]
    args = [torch.randn(2, 3, N), *projection(grad=False), *vectors(case, grad=False), asked, PASS]
    assert passed(ops.affine_linear_backward, args)


def test_affine_linear_backward_opcheck_without_z():
    _, weight, bias = projection(grad=False)
    needs = [True, False, True, False, True, False]
    args = [torch.randn(2, 3, N), None, weight, bias, *vectors("offset_some", grad=False), needs, FOLD]
    assert passed(ops.affine_linear_backward, args)


@pytest.mark.parametrize("case", some_now(list(HEADS), "scale_some", "offset", "both"))
def test_affine_opcheck(case):
    assert passed(ops.affine, [projection()[0], *vectors(case), "aten"])


@pytest.mark.parametrize(
    "case, needs",
    crossed(
        ["both", "no_heads"], [[True, True, True], [True, False, False], [False, True, False], [False, False, True]]
    ),
)
def test_affine_backward_opcheck(case, needs):
    z = projection(grad=False)[0]
    assert passed(ops.affine_backward, [torch.randn(2, 3, K), z, *vectors(case, grad=False), needs, "aten"])


def test_affine_opcheck_of_strided_rows():
    z = torch.randn(2, 3, 2 * K)[..., ::2].requires_grad_()
    assert passed(ops.affine, [z, *vectors("both"), "aten"])
    assert passed(ops.affine_linear, [z, *projection()[1:], *vectors("both"), None, "pass", "aten"])


@pytest.mark.parametrize("form", ["pass", "delta"])
def test_affine_linear_opcheck_of_leaves_that_are_not_contiguous(form):
    z, _, _ = projection()
    weight, bias = torch.randn(K, N).t(), torch.randn(2 * N)[::2]
    scale, offset = torch.randn(D, 2).t(), torch.randn(D, 3).t()
    vectors = [scale, torch.tensor([0, 2]), offset, torch.tensor([0, 1, 3])]
    args = [torch.randn(2, 3, N), z.detach(), weight, bias, *vectors, [True] * 5 + [False], PASS]
    assert passed(ops.affine_linear_backward, args)
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in (weight, bias, *vectors)]
    assert passed(ops.affine_linear, [z, *leaves, None, form, "aten"])


def compiled(function):
    """fullgraph: a graph break raises; T stays symbolic and recompiling for another T is an error."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)


@pytest.mark.parametrize("case, form", some_now(FORMS, ("both", "pass")))
def test_affine_linear_compiles_whole(case, form, dynamo):
    _, weight, bias = projection(grad=False)
    scale, scale_heads, offset, offset_heads = vectors(case)
    leaves = [v for v in (scale, offset) if v is not None]

    def run(z):
        given = {"scale": scale, "scale_heads": scale_heads, "offset": offset, "offset_heads": offset_heads}
        return head_affine_linear(z, weight, bias, **given, form=form)

    fast = compiled(run)
    for index, T in enumerate((5, 8, 3)):
        # a changed T alone must not compile anew
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            z = torch.randn(2, T, K, requires_grad=True)
            y, expected = fast(z), run(z)
            grad = torch.randn_like(y)
            got = torch.autograd.grad(y, [z, *leaves], grad)
        wanted = torch.autograd.grad(expected, [z, *leaves], grad)
        assert torch.equal(y, expected)
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    "case, form, traced", [("scale", "auto", True), ("offset", "auto", True), ("both", "delta", False)]
)
def test_affine_linear_on_a_cpu_is_plain_operations_for_the_compiler(case, form, traced, dynamo):
    z, weight, _ = projection(torch.bfloat16)
    scale, scale_heads, offset, offset_heads = vectors(case)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    def run(z):
        given = {"scale": scale, "scale_heads": scale_heads, "offset": offset, "offset_heads": offset_heads}
        return head_affine_linear(z, weight.detach(), **given, form=form)

    torch.compile(run, fullgraph=True, backend=keep)(z)
    assert len(graphs) == 1
    assert ("lofit.affine_linear" not in graphs[0]) == traced


@pytest.mark.slow
@pytest.mark.parametrize("case", ["scale", "offset", "offset_some"])
def test_affine_linear_compiled_with_inductor_is_as_accurate(case, dynamo):
    T, size = 300, 8 * K
    torch.manual_seed(0)
    weight = (torch.randn(size, size) / 16).bfloat16()
    z, grad = (torch.randn(2, T, size).bfloat16() for _ in range(2))
    z.requires_grad_()
    listed = None if case != "offset_some" else [3, 30]
    rows = (torch.randn(2 if listed else size // D, D) * 0.1).requires_grad_()
    name = case.split("_")[0]

    def run(z, weight, rows):
        return head_affine_linear(z, weight, **{name: rows, f"{name}_heads": listed})

    def results(function, *args):
        y = function(*args)
        return [y, *torch.autograd.grad(y, (args[0], args[2]), grad.to(y.dtype))]

    got = results(torch.compile(run, fullgraph=True, dynamic=True), z, weight, rows)
    eager = results(run, z, weight, rows)
    exact = results(run, *(x.detach().double().requires_grad_(x.requires_grad) for x in (z, weight, rows)))
    for g, e, x in zip(got, eager, exact, strict=True):
        assert g.dtype == e.dtype
        check(g, x, e)


def test_affine_compiles_whole(dynamo):
    scale, scale_heads, offset, offset_heads = vectors("both")

    def run(z):
        return head_affine(z, scale=scale, scale_heads=scale_heads, offset=offset, offset_heads=offset_heads)

    fast = compiled(run)
    for T in (5, 8):
        z = torch.randn(2, T, K, requires_grad=True)
        y = fast(z)
        assert torch.equal(y, run(z))
        got = torch.autograd.grad(y.sum(), [z, scale, offset])
        wanted = torch.autograd.grad(run(z).sum(), [z, scale, offset])
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.slow
def test_affine_linear_compiles_whole_under_autocast(dynamo):
    z, weight, bias = projection(grad=False)
    scale, scale_heads, offset, offset_heads = vectors("both")

    def run(z):
        given = {"scale": scale, "scale_heads": scale_heads, "offset": offset, "offset_heads": offset_heads}
        with torch.autocast("cpu", torch.bfloat16):
            return head_affine_linear(z, weight, bias, **given)

    y = compiled(run)(z)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, run(z))
