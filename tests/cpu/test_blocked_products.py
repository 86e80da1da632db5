"""Products in blocks of rows: the same product, for the products it is meant for, and for no others."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from lofit_fast.cpu import blocked_products

aten, ours = torch.ops.aten.mm.default, torch.ops.lofit_engine.mm.default


def rewritten(columns: int, dtype: torch.dtype) -> list:
    graph = make_fx(torch.mm, tracing_mode="symbolic")(
        torch.ones(600, 64, dtype=dtype), torch.ones(64, columns).to(dtype)
    )
    # Inductor fixes the sizes of weights, and leaves those of batches open
    (weight,) = (node for node in graph.graph.nodes if node.op == "placeholder" and node.name.endswith("1_1"))
    weight.meta["val"] = torch.empty(64, columns, dtype=dtype)
    blocked_products.BlockedProducts()(graph.graph)
    graph.graph.lint()
    return [node.target for node in graph.graph.nodes if node.op == "call_function" and node.target in (aten, ours)]


@pytest.mark.parametrize(
    ("columns", "dtype", "expected"),
    [
        (576, torch.bfloat16, ours),
        (576, torch.float16, ours),
        (576, torch.float32, aten),
        (64, torch.bfloat16, aten),
        (4096, torch.bfloat16, aten),
    ],
)
def test_only_middling_products_of_16_bits_are_rewritten(columns, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert rewritten(columns, dtype) == [expected]


def test_one_thread_leaves_every_product_whole(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert rewritten(576, torch.bfloat16) == [aten]


@pytest.mark.parametrize("beta", [1, 2])
def test_the_bias_of_a_product_becomes_a_sum_of_its_own(beta, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(blocked_products, "_fastest", lambda grains, product: (grains - 7, 7))
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=draw).bfloat16() for shape in ((320,), (600, 64), (64, 320))]
    traced = make_fx(lambda bias, x, weight: torch.addmm(bias, x, weight, beta=beta))(*inputs)
    blocked_products.BlockedProducts()(traced.graph)
    traced.graph.lint()
    traced.recompile()
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    # another sum than the plain one is left alone
    assert called == ([ours, torch.ops.aten.add.Tensor] if beta == 1 else [torch.ops.aten.addmm.default])
    exact = torch.addmm(*(each.double() for each in inputs), beta=beta)
    rounding = 2.0 ** (exact.abs().max().log2().floor() - 8)
    assert (traced(*inputs) - exact).abs().max() <= max(
        2 * (torch.addmm(*inputs, beta=beta) - exact).abs().max(), rounding
    )


@pytest.mark.parametrize("rows", [513, 700, 1535])
@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_mm_in_blocks_is_the_product(rows, blocks, transposed, monkeypatch):
    asked = []

    def fastest(grains, product):
        asked.append(product)
        return (*[5] * (blocks - 1), grains - 5 * (blocks - 1))

    monkeypatch.setattr(blocked_products, "_fastest", fastest)
    x, weight = torch.randn(rows, 96, dtype=torch.bfloat16), torch.randn(96, 320, dtype=torch.bfloat16)
    weight = weight.t().contiguous().t() if transposed else weight
    exact = x.double() @ weight.double()
    allowed = max(2 * (x @ weight - exact).abs().max(), 2.0 ** (exact.abs().max().log2().floor() - 8))
    assert (ours(x, weight) - exact).abs().max() <= allowed
    assert [(product.depth, product.columns, product.transposed) for product in asked] == [(96, 320, transposed)]


@pytest.mark.parametrize("rows", [1, 256, 1536])
def test_mm_measures_nothing_for_other_numbers_of_rows(rows, monkeypatch):
    monkeypatch.setattr(blocked_products, "_fastest", lambda *key: pytest.fail(f"measured {key}"))
    x, weight = torch.randn(rows, 16, dtype=torch.bfloat16), torch.randn(16, 320, dtype=torch.bfloat16)
    assert torch.equal(ours(x, weight), x @ weight)


def test_mm_keeps_the_promises_of_its_schema(monkeypatch):
    monkeypatch.setattr(blocked_products, "_fastest", lambda grains, product: (grains - 7, 7))
    torch.library.opcheck(ours, (torch.randn(600, 16).bfloat16(), torch.randn(16, 320).bfloat16()))


PRODUCT = blocked_products._Product(16, 320, torch.bfloat16, False, 2)


@pytest.fixture
def pretended(monkeypatch):
    """What products of so many grains take, pretended: twice as long from 12 grains on. Returns what was asked."""
    asked = []

    def seconds(grains, product):
        asked.append(grains)
        return grains * (2.0 if grains >= 12 else 1.0) + 0.5

    monkeypatch.setattr(blocked_products, "_seconds", seconds)
    blocked_products._fastest.cache_clear()
    yield asked
    blocked_products._fastest.cache_clear()


@pytest.mark.parametrize(("grains", "blocks"), [(11, 1), (12, 2), (22, 2), (23, 3)])
def test_the_fastest_blocks_are_found(grains, blocks, pretended):
    found = blocked_products._fastest(grains, PRODUCT)
    assert sum(found) == grains and len(found) == blocks
    assert max(found) < 12


def test_a_product_as_fast_as_any_probe_is_left_whole_and_nothing_more_is_measured(pretended):
    assert blocked_products._fastest(11, PRODUCT) == (11,)
    assert sorted(pretended) == [5, 7, 10, 11]


@pytest.mark.parametrize(("rate", "blocks"), [(0.83, 3), (0.84, 1)])
def test_blocks_that_gain_little_are_not_worth_it(rate, blocks, monkeypatch, pretended):
    monkeypatch.setattr(blocked_products, "_seconds", lambda grains, product: grains * (rate if grains == 7 else 1.0))
    # twice 7 and 1 take 12.62 or 12.76, where 12.75 is what they must stay below
    assert len(blocked_products._fastest(15, PRODUCT)) == blocks


def test_products_are_measured_once_per_shape():
    blocked_products._seconds.cache_clear()
    blocked_products._fastest.cache_clear()
    x, weight = torch.randn(288, 16).bfloat16(), torch.randn(16, 320).bfloat16()
    ours(x, weight)
    measured = blocked_products._seconds.cache_info().misses
    assert measured >= 3
    for rows in (270, 272, 260):
        ours(x[:rows], weight)
    assert blocked_products._fastest.cache_info().misses == 1
    assert blocked_products._seconds.cache_info().misses == measured
