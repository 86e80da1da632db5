"""Hidden states on disk: what is written is what is read or it is said, and the folder keeps its bound."""

import copy
import json
import os
import pickle
import random
import time

import pytest
import torch

from lofit_fast.locks import alone
from lofit_fast.training.prefix_cache.store import Damaged, PrefixStore, digest, lock_of, make_room, size_on_disk

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


def edited(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def rewritten(folder, change):
    path = folder / "states.bin"
    path.write_bytes(change(path.read_bytes()))


def flipped(content, bit):
    content = bytearray(content)
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    return bytes(content)


def lengths_of_others(index):
    index["lengths"][1:] = [index["lengths"][2], index["lengths"][1]]


def names_of_others(index):
    index["sequences"].reverse()


# what befalls a store; a sum of all numbers would notice few of the later ones
HARMS = {
    "cut short": lambda folder: rewritten(folder, lambda content: content[:-1]),
    "no states": lambda folder: (folder / "states.bin").unlink(),
    "half an index": lambda folder: os.truncate(folder / "index.json", 100),
    "an empty index": lambda folder: os.truncate(folder / "index.json", 0),
    "an index of another kind": lambda folder: (folder / "index.json").write_text("[]"),
    "an index in depth": lambda folder: (folder / "index.json").write_text("[" * 10**5),
    "an index in another encoding": lambda folder: (folder / "index.json").write_bytes(b"\xff\xfe\x00"),
    "a name lost": lambda folder: edited(folder, lambda index: index["sequences"].pop()),
    "an unknown dtype": lambda folder: edited(folder, lambda index: index.update(dtype="load")),
    "a width of another type": lambda folder: edited(folder, lambda index: index.update(width=None)),
    "a bit": lambda folder: rewritten(folder, lambda content: flipped(content, 517)),
    "a page of zeros": lambda folder: rewritten(folder, lambda c: c[:32] + bytes(32) + c[64:]),
    "rows in another order": lambda folder: rewritten(folder, lambda c: c[16:32] + c[:16] + c[32:]),
    "a number more here and less there": lambda folder: rewritten(folder, lambda c: c[8:16] + c[:8] + c[16:]),
    "lengths of others": lambda folder: edited(folder, lengths_of_others),
    "names of others": lambda folder: edited(folder, names_of_others),
    "another width": lambda folder: edited(folder, lambda index: index.update(width=2, lengths=[6, 2, 8])),
    "another dtype of that size": lambda folder: edited(folder, lambda index: index.update(dtype="bfloat16", width=8)),
}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_is_said(tmp_path, harm):
    write(tmp_path)
    assert PrefixStore.open(tmp_path) is not None
    HARMS[harm](tmp_path)
    with pytest.raises(Damaged, match=str(tmp_path)):
        PrefixStore.open(tmp_path)


def test_one_changed_bit_anywhere_is_noticed(tmp_path):
    write(tmp_path)
    sound = {name: (tmp_path / name).read_bytes() for name in ("states.bin", "index.json")}
    draw = random.Random(0)
    for name in [*sound] * 50:
        (tmp_path / name).write_bytes(flipped(sound[name], draw.randrange(8 * len(sound[name]))))
        with pytest.raises(Damaged):
            PrefixStore.open(tmp_path)
        (tmp_path / name).write_bytes(sound[name])
    assert PrefixStore.open(tmp_path) is not None


def test_a_fill_that_did_not_end_is_no_store(tmp_path):
    write(tmp_path)
    (tmp_path / "index.json").unlink()
    assert PrefixStore.open(tmp_path) is None


def test_another_process_maps_the_same_files(tmp_path):
    content = write(tmp_path)
    handed = pickle.dumps(PrefixStore.open(tmp_path))
    assert len(handed) < 1000
    there = pickle.loads(handed)
    assert all(there.find(ids).equal(states) for ids, states in content)
    PrefixStore.discard(tmp_path)
    write(tmp_path)
    with pytest.raises(ValueError, match="holds another store by now"):
        pickle.loads(handed)
    PrefixStore.discard(tmp_path)
    with pytest.raises(ValueError, match="has changed since this process was begun"):
        pickle.loads(handed)


def test_a_store_that_is_no_file_is_handed_on_whole():
    there = copy.deepcopy(PrefixStore(torch.ones(2, 3), {digest((1, 2)): (0, 2)}))
    assert there.find((1, 2)).equal(torch.ones(2, 3))


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


def left_behind(root):
    """A whole store with a killed write in it, a folder that no fill has ended in, and one of somebody else's."""
    write(root / NAMES[0])
    for folder in (root / NAMES[0] / ".lofit-cut", root / NAMES[1], root / "mine"):
        folder.mkdir()
        (folder / "states.bin").write_bytes(b"half")


def test_make_room_sweeps_up_after_the_killed(tmp_path):
    left_behind(tmp_path)
    make_room(tmp_path, "d" * 32, 10**9)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {NAMES[0], "mine"}
    assert {path.name for path in (tmp_path / NAMES[0]).iterdir()} == {"states.bin", "index.json"}


def test_make_room_leaves_what_is_being_filled(tmp_path):
    left_behind(tmp_path)
    with alone(lock_of(tmp_path / NAMES[0]), "fill"), alone(lock_of(tmp_path / NAMES[1]), "fill"):
        make_room(tmp_path, "d" * 32, 10**9)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {*NAMES[:2], "mine"}
    assert (tmp_path / NAMES[0] / ".lofit-cut").exists()


def test_discard_takes_what_the_killed_have_left(tmp_path):
    left_behind(tmp_path)
    PrefixStore.discard(tmp_path / NAMES[0])
    assert list((tmp_path / NAMES[0]).iterdir()) == []
