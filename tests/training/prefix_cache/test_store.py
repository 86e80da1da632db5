"""Hidden states on disk: what is written is what is read, half of it is nothing, and the folder keeps its bound."""

import json
import os
import time

import pytest
import torch

from lofit_fast.training.prefix_cache.store import PrefixStore, digest, make_room, size_on_disk

SEQUENCES = [(5, 6, 7), (8,), (5, 6, 9, 10)]
NAMES = ["a" * 32, "b" * 32, "c" * 32]


def filled(dtype=torch.float32, width=4):
    return [(ids, torch.randn(len(ids), width).to(dtype)) for ids in SEQUENCES]


def write(folder, dtype=torch.float32):
    content = filled(dtype)
    PrefixStore.write(folder, content)
    return content


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_store_gives_back_what_it_took(tmp_path, dtype):
    content = write(tmp_path / "new", dtype)
    store = PrefixStore.open(tmp_path / "new")
    assert len(store) == 3
    for ids, states in content:
        assert store.find(list(ids)).equal(states)
        assert store.find(ids).dtype == dtype
    assert store.find((5, 6)) is None
    assert store.find((5, 6, 7, 0)) is None


def test_store_is_as_large_as_its_tokens(tmp_path):
    write(tmp_path, torch.bfloat16)
    assert (tmp_path / "states.bin").stat().st_size == 8 * 4 * 2
    assert {path.name for path in tmp_path.iterdir()} == {"states.bin", "index.json"}
    assert size_on_disk(tmp_path) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_store_on_disk_is_out_of_reach(tmp_path):
    write(tmp_path)
    before = (tmp_path / "states.bin").read_bytes()
    PrefixStore.open(tmp_path).find(SEQUENCES[0]).zero_()
    assert (tmp_path / "states.bin").read_bytes() == before


def test_digest_tells_sequences_apart():
    assert digest([1, 2]) == digest((1, 2))
    assert len({digest(ids) for ids in [(1, 2), (2, 1), (12,), (1, 2, 0), (258,), ()]}) == 6


def cut_short(folder):
    (folder / "states.bin").write_bytes((folder / "states.bin").read_bytes()[:-1])


def drop_index(folder):
    (folder / "index.json").unlink()


def drop_states(folder):
    (folder / "states.bin").unlink()


def halve_index(folder):
    text = (folder / "index.json").read_text()
    (folder / "index.json").write_text(text[: len(text) // 2])


def lose_a_name(folder):
    index = json.loads((folder / "index.json").read_text())
    index["sequences"].pop()
    (folder / "index.json").write_text(json.dumps(index))


def change_a_bit_in_the_middle(folder):
    content = bytearray((folder / "states.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "states.bin").write_bytes(content)


def lose_a_page(folder):
    content = (folder / "states.bin").read_bytes()
    (folder / "states.bin").write_bytes(content[:32] + bytes(32) + content[64:])


HARMS = [cut_short, drop_index, drop_states, halve_index, lose_a_name, change_a_bit_in_the_middle, lose_a_page]


@pytest.mark.parametrize("harm", HARMS)
def test_store_that_is_not_whole_is_none(tmp_path, harm):
    write(tmp_path)
    assert PrefixStore.open(tmp_path) is not None
    harm(tmp_path)
    assert PrefixStore.open(tmp_path) is None


def test_store_never_written_is_none(tmp_path):
    assert PrefixStore.open(tmp_path / "nowhere") is None


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_store_interrupted_leaves_nothing(tmp_path, error):
    def failing():
        yield filled()[0]
        raise error

    with pytest.raises(type(error)):
        PrefixStore.write(tmp_path, failing())
    assert list(tmp_path.iterdir()) == []


def test_store_discarded_while_in_use_can_still_be_read(tmp_path):
    content = write(tmp_path)
    store = PrefixStore.open(tmp_path)
    PrefixStore.discard(tmp_path)
    assert PrefixStore.open(tmp_path) is None
    assert all(store.find(ids).equal(states) for ids, states in content)
    PrefixStore.discard(tmp_path)


def stores(root):
    """Three stores, each used a minute after the one before."""
    for age, name in enumerate(NAMES):
        write(root / name)
        then = time.time() - 60 * (len(NAMES) - age)
        os.utime(root / name / "index.json", (then, then))
    return size_on_disk(root / NAMES[0])


@pytest.mark.parametrize("allowed, left", [(3, "abc"), (2.5, "bc"), (1, "c"), (0.5, ""), (-1, "")])
def test_make_room_drops_the_longest_unused(tmp_path, allowed, left):
    one = stores(tmp_path)
    make_room(tmp_path, "d" * 32, int(allowed * one))
    assert {path.name[0] for path in tmp_path.iterdir()} == set(left)


def test_make_room_goes_by_last_use(tmp_path):
    one = stores(tmp_path)
    PrefixStore.open(tmp_path / NAMES[0])
    make_room(tmp_path, "d" * 32, one)
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[0]]


def test_make_room_keeps_what_it_makes_room_for(tmp_path):
    stores(tmp_path)
    make_room(tmp_path, NAMES[0], 0)
    assert [path.name for path in tmp_path.iterdir()] == [NAMES[0]]


def test_make_room_sweeps_up_after_the_killed_only(tmp_path):
    write(tmp_path / NAMES[0])
    for name, age in (("old", 7200), ("new", 60)):
        for folder in (tmp_path / NAMES[0] / f".lofit-{name}", tmp_path / (name[0] * 31 + "0").replace("o", "e")):
            if name == "new" and folder.parent == tmp_path:
                folder = tmp_path / ("f" * 32)
            folder.mkdir(parents=True)
            (folder / "states.bin").write_bytes(b"half")
            then = time.time() - age
            os.utime(folder / "states.bin", (then, then))
            os.utime(folder, (then, then))
    (tmp_path / "mine").mkdir()
    make_room(tmp_path, "d" * 32, 10**9)
    assert {path.name for path in tmp_path.iterdir()} == {NAMES[0], "f" * 32, "mine"}
    assert {path.name for path in (tmp_path / NAMES[0]).iterdir()} == {"states.bin", "index.json", ".lofit-new"}
