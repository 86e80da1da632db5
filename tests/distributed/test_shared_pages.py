"""The base of several processes is in a machine's memory once, whatever dtype it is asked for in."""

import os
import re
from pathlib import Path

import pytest
import torch

import lofit_fast as lf
from lofit_fast.models.load import load_model
from lofit_fast.models.shared_pages import as_mapped, copies, in_turns, weight_files
from lofit_fast.models.written_weights import write_model
from lofit_fast.ranks import gathered
from tests.oracle import randomize
from tests.several_processes import in_processes
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="only Linux tells what a process maps"),
]
LARGE = {"vocab_size": 400, "hidden_size": 384, "intermediate_size": 1536, "head_dim": 64, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of 25 MB in float32 files, with its tokenizer."""
    folder = tmp_path_factory.mktemp("large")
    tiny_model("llama", **LARGE).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def memory(file: str | None = None) -> dict[str, int]:
    """Bytes of this process's pages by kind, of what it maps of files of that name, or of all."""
    sums: dict[str, int] = {}
    here = file is None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            here = file is None or line.endswith(file)
        elif here and line.endswith(" kB"):
            kind, size, _ = line.split()
            sums[kind[:-1]] = sums.get(kind[:-1], 0) + 1024 * int(size)
    return sums


def trained_a_step(source, dtype):
    """(what the base's file takes of this process, what the process has by itself of it, its bytes), when all do so."""
    before = memory()["Anonymous"]
    model, _ = load_model(source, dtype=dtype, device="cpu")
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    ids = torch.arange(6)[None] + 3
    model(input_ids=ids, labels=ids).loss.backward()
    gathered("here")
    mapped, own = memory(".safetensors"), memory()["Anonymous"] - before
    gathered("measured")
    assert all(parameter.grad is not None for parameter in handle.parameters())
    return mapped, own, sum(p.nbytes for p in set(model.parameters()) - set(handle.parameters()))


@pytest.mark.parametrize(
    ("dtype", "processes"),
    [
        ("float32", 2),
        *(pytest.param("float32", n, marks=pytest.mark.slow) for n in (1, 3)),
        *(pytest.param("bfloat16", n, marks=pytest.mark.slow) for n in (1, 2, 3)),
    ],
)
def test_the_pages_of_the_base_are_there_once(saved, dtype, processes):
    # the heap of the one that converts keeps room for what has been freed
    load_model(saved, dtype=dtype, device="cpu", shared=processes > 1)
    found = in_processes(processes, lambda rank: trained_a_step(saved, dtype))
    for mapped, own, size in found:
        if (dtype, processes) == ("bfloat16", 1):
            # by itself a process converts, and writes no file
            assert own > size and not mapped.get("Rss")
            continue
        # all of it is mapped, and nothing of it was written into; gradients and activations are the process's own
        assert mapped["Rss"] > 0.95 * size and mapped["Anonymous"] < 0.02 * size
        assert own < 0.7 * size
        assert mapped["Pss"] == pytest.approx(mapped["Rss"] / processes, rel=0.05)


def test_a_converted_base_is_the_converted_base(saved):
    def parts(model):
        about = model.config.to_dict(), model.name_or_path, model.generation_config.to_dict()
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, *about

    (alone, *about), (shared, *as_shared) = (
        parts(load_model(saved, dtype="bfloat16", device="cpu", shared=shared)[0]) for shared in (False, True)
    )
    assert about == as_shared and alone.keys() == shared.keys()
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


@pytest.mark.slow
def test_merging_writes_into_pages_of_its_own(saved):
    def work(rank):
        model, _ = load_model(saved, dtype="float32", device="cpu")
        name = "model.layers.0.self_attn.o_proj.weight"
        before = model.get_parameter(name).detach().clone()
        handle = lf.patch(model, lf.LofitConfig(scale="all"))
        randomize(handle)
        if rank == 0:
            handle.merge()
        gathered("merged")
        changed = not torch.equal(model.state_dict()[name], before)
        again, _ = load_model(saved, dtype="float32", device="cpu")
        return changed, torch.equal(again.get_parameter(name), before)

    assert in_processes(2, work) == [(True, True), (False, True)]


@pytest.mark.slow
def test_a_damaged_conversion_is_made_anew(saved):
    def load(source):
        made.append(source)
        return load_model(source, dtype="float16", device="cpu", shared=False)[0]

    made: list[str] = []
    folder = as_mapped(saved, torch.float16, load)
    assert as_mapped(saved, torch.float16, load) == folder and made == [saved]
    (file,) = weight_files(folder)
    assert copies([file], torch.float32) and not copies([file], torch.float16)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert as_mapped(saved, torch.float16, load) == folder and made == [saved] * 2
    assert os.path.dirname(folder).endswith("shared_pages")


@pytest.mark.slow
def test_copies_for_an_accelerator_are_made_in_turns(saved, tmp_path):
    def work(rank):
        with in_turns(saved, torch.bfloat16):
            mark = tmp_path / "inside"
            alone = not mark.exists()
            mark.touch()
            torch.zeros(10**6).sum()
            mark.unlink()
        return alone

    assert in_processes(3, work) == [True] * 3


@pytest.mark.slow
def test_any_process_may_be_the_one_that_writes(saved):
    def work(rank):
        model, folder = tiny_model("llama"), os.environ["LOFIT_FAST_CACHE"] + f"/written-{rank}"
        write_model(model, Path(folder))
        tiny_tokenizer().save_pretrained(folder)
        assert "should_save_on_this_rank" not in vars(model)
        return torch.equal(load_model(folder, dtype="float32", device="cpu")[0].lm_head.weight, model.lm_head.weight)

    assert in_processes(2, work) == [True] * 2
