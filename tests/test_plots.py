"""Pictures are written, look like pictures, and leave pyplot alone."""

import struct
import sys

import pytest
import torch

from lofit_fast.plots import heads_map, loss_curves

pytest.importorskip("matplotlib")

HISTORY = [
    {"stage": stage, "epoch": epoch, "loss": 2.0 / epoch, "eval_loss": 3.0 / epoch, "l1": 0.1, "seconds": 1.0}
    for stage in ("select", "tune")
    for epoch in (1, 2, 3)
]


def size_of(path):
    """(width, height) in pixels, from the PNG's own header."""
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    assert len(content) > 3000
    return struct.unpack(">II", content[16:24])


def test_heads_map_grows_with_the_model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = {}
    for layers, heads in ((3, 4), (30, 9)):
        path = tmp_path / f"{layers}.png"
        assert heads_map(torch.rand(layers, heads, generator=generator), [(0, 1), (2, 3)], path, "title") == path
        sizes[layers] = size_of(path)
    assert sizes[30][0] > sizes[3][0]
    assert sizes[30][1] > sizes[3][1]


def test_heads_map_rings_the_chosen_heads(tmp_path):
    scores = torch.rand(3, 4)
    with_rings, without = heads_map(scores, [(2, 3)], tmp_path / "a.png"), heads_map(scores, [], tmp_path / "b.png")
    assert size_of(with_rings) == size_of(without)
    assert with_rings.read_bytes() != without.read_bytes()


@pytest.mark.parametrize("scores", [torch.zeros(1, 1), torch.full((2, 2), -torch.inf), torch.rand(48, 64)])
def test_heads_map_of_odd_scores(tmp_path, scores):
    assert min(size_of(heads_map(scores, [(0, 0)], tmp_path / "heads.png"))) > 100


def test_loss_curves_of_one_and_two_steps(tmp_path):
    both = size_of(loss_curves(HISTORY, tmp_path / "both.png", "title"))
    one = size_of(loss_curves(HISTORY[3:], tmp_path / "one.png"))
    assert both[1] == one[1]
    assert both[0] == 2 * one[0]


def test_loss_curves_show_evaluation_where_there_is_one(tmp_path):
    plain = [{key: row[key] for key in ("stage", "epoch", "loss")} for row in HISTORY]
    path = loss_curves(plain, tmp_path / "plain.png")
    assert size_of(path)
    assert path.read_bytes() != loss_curves(HISTORY, tmp_path / "both.png").read_bytes()


def test_plots_without_a_name_are_refused():
    with pytest.raises(ValueError, match="expected the path of a file or folder, got ''"):
        loss_curves(HISTORY, "")


def test_plots_make_their_folder(tmp_path):
    path = loss_curves(HISTORY, str(tmp_path / "new" / "loss.png"))
    assert size_of(path)
    assert path.parent == tmp_path / "new"


def test_plots_leave_pyplot_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    import matplotlib

    # a plain dict() would look the backend up, which imports pyplot
    before = matplotlib.rcParams.copy()
    heads_map(torch.rand(3, 4), [(0, 0)], tmp_path / "heads.png")
    loss_curves(HISTORY, tmp_path / "loss.png")
    assert "matplotlib.pyplot" not in sys.modules
    assert matplotlib.rcParams.copy() == before


def test_plots_replace_a_link_and_leave_what_it_leads_to(tmp_path):
    (tmp_path / "theirs.png").write_text("theirs")
    (tmp_path / "heads.png").symlink_to(tmp_path / "theirs.png")
    heads_map(torch.rand(3, 4), [(0, 0)], tmp_path / "heads.png")
    assert (tmp_path / "theirs.png").read_text() == "theirs"
    assert not (tmp_path / "heads.png").is_symlink()
    assert size_of(tmp_path / "heads.png")


def test_plots_that_cannot_be_written_leave_nothing(tmp_path):
    (tmp_path / "heads.png").mkdir()
    with pytest.raises(OSError, match=f"cannot write to output folder {tmp_path}: heads.png is there"):
        heads_map(torch.rand(3, 4), [(0, 0)], tmp_path / "heads.png")
    assert [path.name for path in tmp_path.iterdir()] == ["heads.png"]
