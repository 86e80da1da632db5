"""What one adapted projection costs in launches, bytes moved and bytes saved: exact, ours and the peers'."""

from dataclasses import replace

import pytest
import torch

import lofit_fast as lf
from benchmarks.proof import counts
from benchmarks.proof.traffic import counted
from benchmarks.speed.op.operators import OPERATORS, SETTINGS, no_compiler, projection
from lofit_kernels.shapes import SHAPES
from tests.ordinary_sample import slow_if
from tests.tiny_models import HEAD_DIM, HEADS, tiny_model

pytest.importorskip("triton")

SHAPE = replace(SHAPES["toy"], H=8, D=32, N=192)
T = 256


def on(setting, rows=T, shape=SHAPE):
    return projection(setting, shape, rows, torch.bfloat16, "cpu")


def paths_of_ours():
    for setting in SETTINGS:
        p = on(setting, rows=1)
        yield from ((setting, row) for row in OPERATORS.values() if row.ours and row.refusal(p) is None)


def bytes_per_element(name, setting):
    """Bytes moved per element of z, without what does not grow with T."""
    moved = [counts.traffic(OPERATORS[name], on(setting, rows)).bytes for rows in (T, 5 * T)]
    return (moved[1] - moved[0]) / (4 * T * SHAPE.K)


# in the ordinary run every path with a scale, an offset or both on all heads, and one on a few; slow: the others
OURS = slow_if(lambda setting, row: "few" in setting and row.name != "ours", list(paths_of_ours()))


@pytest.mark.parametrize("setting, row", OURS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_ours_saves_nothing_that_sdpa_does_not_keep_anyway(setting, row):
    p = on(setting, rows=32)
    found = counts.count(row, p)
    z_bytes = p.z.numel() * p.z.element_size()
    assert found.saved_sdpa == 0
    assert found.saved_eager == (0 if p.scale is None else z_bytes)


@pytest.mark.parametrize(
    "name, setting, of_z, of_parameters",
    [
        # 1 + a in float32; under eager attention also z
        ("hook", "step 1", (0, 1), SHAPE.K * 4),
        ("hook", "step 2", (0, 0), 0),
        # clones of every head's slice, and 1 + a of each
        ("original", "step 1", (1, 1), SHAPE.K * 4),
        # 1 + 0 of every head, though none has a scale that learns
        ("original", "step 2", (0, 0), SHAPE.K * 4),
    ],
)
def test_what_the_peers_save(name, setting, of_z, of_parameters):
    p = on(setting)
    found = counts.count(OPERATORS[name], p)
    z_bytes = p.z.numel() * p.z.element_size()
    assert found.saved_sdpa == of_z[0] * z_bytes + of_parameters
    assert found.saved_eager == of_z[1] * z_bytes + of_parameters


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("component", ["scale", "offset"])
def test_saved_by_a_patched_projection_of_a_model(component, attention):
    batch, length = 2, 11
    model = tiny_model("llama", attn_implementation=attention)
    handle = lf.patch(model, lf.LofitConfig(**{component: [(1, head) for head in range(HEADS)]}))
    embedded = torch.randn(batch, length, model.config.hidden_size).requires_grad_()
    constants = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}

    def saved():
        found = counts.saved_storages(lambda: model.model(inputs_embeds=embedded, use_cache=False)[0])
        return sum(x.untyped_storage().nbytes() for at, x in found.items() if at not in constants)

    with_adapter = saved()
    with handle.disabled():
        without = saved()
    z_bytes = batch * length * HEADS * HEAD_DIM * 4
    assert with_adapter - without == (z_bytes if (component, attention) == ("scale", "eager") else 0)


@pytest.mark.parametrize(
    "name, setting, launches, gemms, moved",
    [
        ("floor", "both", 2, 2, 0),
        # forward: multiply 6, add 8, cast 6; backward: cast 6, multiply 10, sum 4, multiply 8, sum 4, cast 6
        ("hook", "both", 12, 2, 58),
        ("hook", "step 1", 10, 2, 46),
        ("hook", "step 2", 11, 2, 28),
        # 19 for each head
        ("original", "both", 6 + 19 * SHAPE.H, 2, None),
    ],
)
def test_launches_and_bytes_of_the_peers(name, setting, launches, gemms, moved):
    found = counts.traffic(OPERATORS[name], on(setting))
    assert (found.launches, found.gemms) == (launches, gemms)
    assert moved is None or bytes_per_element(name, setting) == moved


def test_the_original_loop_moves_more_the_more_heads_there_are():
    narrow, wide = (replace(SHAPE, H=heads, D=256 // heads) for heads in (4, 8))
    few, many = (counts.traffic(OPERATORS["original"], on("both", shape=shape)).bytes for shape in (narrow, wide))
    # in backward every head copies, fills and adds the whole gradient once more
    per_head = (many - few) / 4 / (T * SHAPE.K)
    assert per_head == pytest.approx(12, abs=0.01)


# the most that a path of ours may launch and move per element of z; partial sums add a little to the round numbers
@pytest.mark.parametrize(
    "name, setting, launches, gemms, moved",
    [
        ("pass triton", "step 1", 5, 2, 4 + 6),
        # the pass, and what it loses
        ("delta triton", "step 1", 7, 3, 4 + 4 + 2 * SHAPE.N / SHAPE.K + 6),
        # the column sum reads dY
        ("fold triton", "step 2", 8, 2, 2 * SHAPE.N / SHAPE.K),
        ("delta triton fused", "step 1", 4, 2, 0 + 2),
        ("pass triton fused", "step 1", 6, 2, 0 + 2),
        ("pass triton fused_backward", "step 1", 5, 2, 4 + 2),
        ("fold aten", "step 2", 10, 2, 2 * SHAPE.N / SHAPE.K),
    ],
)
def test_launches_and_bytes_of_ours_are_at_most(name, setting, launches, gemms, moved):
    found = counts.traffic(OPERATORS[name], on(setting))
    assert found.gemms <= gemms and found.launches <= launches
    assert bytes_per_element(name, setting) <= moved + 0.5


@pytest.mark.slow
def test_inductor_says_how_many_kernels_it_generates():
    p = on("both", rows=16)
    if no_compiler(p.z.device):
        pytest.skip(no_compiler(p.z.device))
    found = counts.inductor_traffic(OPERATORS["compiled_hook"], p)
    assert found.gemms == 2
    assert found.gemms < found.launches < counts.traffic(OPERATORS["hook"], p).launches
    # at least one pass each way: z to x, and G with z to dz
    assert 10 <= found.bytes / p.z.numel() < 58


def test_an_unknown_operator_is_not_guessed_at():
    x = torch.randn(3)
    with pytest.raises(NotImplementedError, match="aten::tanh"), counted():
        x.tanh()


def test_the_table_goes_between_its_markers(tmp_path, capsys):
    page = tmp_path / "counts.md"
    page.write_text("before\n<!-- counts -->\nstale\n<!-- end of counts -->\nafter\n")
    options = ["--model", "toy", "--tokens", "16", "--no-compile", "--markdown", str(page)]
    assert counts.main(options) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert "| both | hook | 12 | 2 |" in text
    assert "step 1, fold_eager: a fold of the offset cannot express a scale" in text
    assert "left out by --no-compile" in capsys.readouterr().out
    page.write_text("no markers")
    with pytest.raises(SystemExit):
        counts.main(options)
