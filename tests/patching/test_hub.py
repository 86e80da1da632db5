"""Adapters of the hub: pushed, fetched, kept in the cache, and every way in which that fails says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lofit_fast import LofitConfig, handle_of, load, patch
from lofit_fast.patching import hub_push
from lofit_fast.patching.seal import tensors_digest
from lofit_fast.patching.storage import CONFIG_FILE, TENSOR_FILE
from tests.fake_hub import fake_hub
from tests.library_versions import PICTURES
from tests.oracle import randomize
from tests.patched_models import SOME, logits, snapshot
from tests.tiny_models import tiny_model

REPO = "somebody/kinship"


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Pictures cost a second; one test has one drawn."""
    if "drawn" not in request.node.name:
        monkeypatch.setattr(hub_push, "can_draw", lambda: False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    # relative names must not meet a folder of the checkout
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with fake_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(folder, its files, the logits with it)."""
    model = tiny_model("llama")
    handle = patch(model, LofitConfig(offset=SOME))
    randomize(handle)
    folder = handle.save(tmp_path_factory.mktemp("adapters") / "adapter")
    with torch.no_grad():
        return folder, {path.name: path.read_bytes() for path in folder.iterdir()}, logits(model)


def same_as(adapter, name, **options):
    model = tiny_model("llama")
    load(model, name, **options)
    with torch.no_grad():
        return torch.equal(logits(model), adapter[2])


def refuses(name, error, match, **options):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(error, match=match):
        load(model, name, **options)
    assert handle_of(model) is None and snapshot(model) == before


def test_a_hub_id_is_loaded_and_kept(hub, adapter, monkeypatch):
    hub.commit(REPO, {**adapter[1], "pytorch_model.bin": b"never fetched", "README.md": b"# nor this"})
    assert same_as(adapter, REPO, strict=True)
    assert hub.names_fetched() == {CONFIG_FILE, TENSOR_FILE}
    # and from the cache, with the network forbidden
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert same_as(adapter, REPO)
    assert len(hub.asked) == asked


def test_revisions(hub, adapter):
    first = hub.commit(REPO, adapter[1])
    hub.commit(REPO, {CONFIG_FILE: b"{}"})
    for name, options in ((f"{REPO}@{first}", {}), (REPO, {"revision": first})):
        assert same_as(adapter, name, **options)
    refuses(REPO, ValueError, f"{REPO} on the hub holds no adapter that can be read.*not a LoFiT adapter")
    refuses(REPO, FileNotFoundError, "has no revision 'v9' on the hub", revision="v9")
    refuses(f"{REPO}@v1", ValueError, "expected one revision", revision="v2")
    refuses(REPO, ValueError, "expected revision to be a branch, tag or commit of the hub", revision="")
    refuses(adapter[0], ValueError, "revision='main' is of the hub: .* is a folder", revision="main")


def test_a_folder_of_that_name_wins(hub, adapter):
    shutil.copytree(adapter[0], Path(REPO))
    assert same_as(adapter, REPO)
    assert hub.asked == []
    # the hub's cache has one of that name too, of other vectors
    hub.commit(REPO, adapter[1])
    assert same_as(adapter, f"{REPO}@main")
    with pytest.warns(UserWarning, match="is a folder here and an adapter in the hub's cache: the folder is taken"):
        assert same_as(adapter, REPO)
    # a Path is a folder and nothing else
    refuses(Path("nobody/nothing"), FileNotFoundError, "is no adapter folder")


def test_only_what_describes_an_adapter_is_followed_by_its_tensors(hub, adapter):
    hub.commit(REPO, {CONFIG_FILE: json.dumps({"peft_type": "LORA"}).encode(), TENSOR_FILE: b"x" * 100})
    refuses(REPO, ValueError, f"{REPO} on the hub holds no adapter that can be read.*got 'LORA'")
    assert hub.names_fetched() == {CONFIG_FILE}
    hub.commit("somebody/model", {"config.json": b"{}"})
    refuses("somebody/model", FileNotFoundError, "is no adapter of lofit-fast: it has no adapter_config.json")
    hub.commit("somebody/half", {CONFIG_FILE: adapter[1][CONFIG_FILE]})
    refuses("somebody/half", FileNotFoundError, "it has no adapter_model.safetensors")


def test_damage_and_other_bases_are_noticed_as_in_local_folders(hub, adapter):
    damaged = bytearray(adapter[1][TENSOR_FILE])
    damaged[-1] ^= 1
    hub.commit(REPO, {**adapter[1], TENSOR_FILE: bytes(damaged)})
    refuses(REPO, ValueError, "is damaged")
    hub.commit("somebody/whole", adapter[1])
    with pytest.raises(ValueError, match="the adapter in somebody/whole was trained on other weights"):
        load(tiny_model("llama", seed=3), "somebody/whole", strict=True)
    with pytest.warns(UserWarning, match="somebody/whole was trained on other weights") as warned:
        load(tiny_model("llama", seed=3), "somebody/whole")
    assert warned[0].filename == __file__


def test_what_cannot_be_fetched_says_what_to_do(hub, monkeypatch):
    refuses("no/body", FileNotFoundError, "no such folder here, and no such repository on the hub.*hf auth login")
    hub.commit(REPO, {})
    hub.gated.add(REPO)
    refuses(REPO, PermissionError, "is gated on the hub: ask for access")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuses("no/body", FileNotFoundError, r"may not be asked \(HF_HUB_OFFLINE\).*hf download no/body adapter_config")


def test_one_more_adapter_from_the_hub(hub, adapter):
    hub.commit(REPO, adapter[1])
    model = tiny_model("llama")
    handle = patch(model, LofitConfig(offset=[(0, 0)]))
    handle.add("theirs", REPO)
    handle.set_active("theirs")
    with torch.no_grad():
        assert torch.allclose(logits(model), adapter[2], rtol=1e-5, atol=1e-6)


RUN = {
    "model": "smollm2",
    "task": "kinship",
    "accuracy_after_tune": 0.75,
    "data_seed": 42,
    "recipe": {"tune_lr": 0.01, "select": "lofit"},
    "environment": {"torch": "2", "device": "CPU"},
}


def finished_run(folder, handle, **changes):
    folder.mkdir()
    digest = tensors_digest(handle.vectors())
    (folder / "summary.json").write_text(json.dumps({**RUN, "adapter_digest": digest, **changes}))
    (folder / "heads.png").write_bytes(b"\x89PNG of the run")
    return folder


def test_pushed_and_loaded_again(hub, adapter, tmp_path):
    handle = load(tiny_model("llama"), adapter[0])
    run = finished_run(tmp_path / "run", handle)
    options = {"run": run, "license": "apache-2.0", "token": "hf_nobody"}
    url = handle.push_to_hub(REPO, **options)
    assert f"/{REPO}/commit/" in url
    files = hub.files(REPO)
    assert files.keys() == {CONFIG_FILE, TENSOR_FILE, "README.md", "heads.png"}
    assert files["heads.png"] == b"\x89PNG of the run"
    assert same_as(adapter, REPO, strict=True)
    # a second time, to a branch
    handle.push_to_hub(REPO, revision="second", **options)
    assert hub.files(REPO, "second").keys() == files.keys()


def test_the_card_says_what_the_run_was(adapter, tmp_path):
    handle = load(tiny_model("llama"), adapter[0])
    handle.model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    run = finished_run(tmp_path / "run", handle)
    folder = tmp_path / "out"
    assert handle.push_to_hub(REPO, run=run, license="mit", folder=folder, dry_run=True) == str(folder)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n")
    assert "library_name: lofit-fast" in card and "license: mit" in card
    for line in ("| task | kinship |", "| tune_lr | 0.01 |", "| exact match after step 2 | 0.7500 |", "| 1 | 0, 3 |"):
        assert line in card
    assert "![the heads](heads.png)" in card and f'lf.load(model, "{REPO}")' in card
    # the folder is an adapter, and may be written again
    handle.push_to_hub(REPO, folder=folder, dry_run=True)
    assert "No licence was stated" in (folder / "README.md").read_text()
    assert same_as(adapter, folder)


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["run", "other/../run"])
def test_the_runs_own_folder_is_refused_and_keeps_its_files(adapter, tmp_path, name):
    handle = load(tiny_model("llama"), adapter[0])
    run = finished_run(tmp_path / "run", handle)
    (tmp_path / "other").mkdir()
    before = files_in(run)
    with pytest.raises(ValueError, match="run is the run's own folder, whose files would be lost: expected another"):
        handle.push_to_hub(REPO, run=run, folder=tmp_path / name, dry_run=True)
    assert files_in(run) == before


@pytest.mark.parametrize("card", [None, "---\nlibrary_name: lofit-fast\n---\nwithout a picture"])
def test_a_picture_of_ones_own_is_kept(adapter, tmp_path, card):
    handle = load(tiny_model("llama"), adapter[0])
    run, page = finished_run(tmp_path / "run", handle), tmp_path / "page"
    page.mkdir()
    (page / "heads.png").write_bytes(b"mine")
    if card is not None:
        (page / "README.md").write_text(card)
    before = files_in(page)
    for options in ({}, {"run": run}):
        with pytest.raises(ValueError, match=r"heads.png is no picture of ours to replace: expected another folder"):
            handle.push_to_hub(REPO, folder=page, dry_run=True, **options)
    assert files_in(page) == before


def test_a_picture_of_an_earlier_push_is_replaced_or_goes_with_its_card(hub, adapter, tmp_path):
    handle = load(tiny_model("llama"), adapter[0])
    run, page = finished_run(tmp_path / "run", handle), tmp_path / "page"
    page.mkdir()
    (page / "notes.txt").write_text("mine")
    for picture in (b"first", b"second"):
        (run / "heads.png").write_bytes(picture)
        handle.push_to_hub(REPO, run=run, folder=page)
        assert files_in(page)["heads.png"] == hub.files(REPO)["heads.png"] == picture
    handle.push_to_hub("somebody/plain", folder=page)
    assert files_in(page).keys() == {CONFIG_FILE, TENSOR_FILE, "README.md", "notes.txt"}
    assert hub.files("somebody/plain").keys() == {CONFIG_FILE, TENSOR_FILE, "README.md"}
    assert (page / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_finished_is_as_it_was(adapter, tmp_path, monkeypatch):
    handle = load(tiny_model("llama"), adapter[0])
    run, page = finished_run(tmp_path / "run", handle), tmp_path / "page"
    handle.push_to_hub(REPO, run=run, folder=page, dry_run=True)
    before = files_in(page)

    def full(*args):
        raise OSError(28, "No space left on device")

    randomize(handle, seed=5)
    (run / "summary.json").write_text(json.dumps(RUN))
    monkeypatch.setattr(hub_push.shutil, "copyfile", full)
    for folder in (page, tmp_path / "new"):
        with pytest.raises(OSError, match=f"cannot write to output folder {folder}: No space left"):
            handle.push_to_hub(REPO, run=run, folder=folder, dry_run=True)
    assert files_in(page) == before and not (tmp_path / "new").exists()


def test_a_repository_that_is_public_stays_so_and_gets_nothing_private(hub, adapter):
    handle = load(tiny_model("llama"), adapter[0])
    handle.push_to_hub(REPO)
    before = hub.files(REPO)
    with pytest.raises(
        ValueError, match=f"{REPO} is public already, and private=True was asked for: nothing was pushed"
    ):
        handle.push_to_hub(REPO, private=True)
    assert hub.files(REPO) == before
    handle.push_to_hub("somebody/hidden", private=True)
    handle.push_to_hub("somebody/hidden", private=True)
    assert "somebody/hidden" in hub.private and hub.files("somebody/hidden")


def test_a_folder_with_a_model_is_no_place(adapter, tmp_path):
    handle = load(tiny_model("llama"), adapter[0])
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match="holds a model"):
        handle.push_to_hub(REPO, folder=tmp_path, dry_run=True)
    assert files_in(tmp_path) == {"model.safetensors": b"weights"}


def test_what_is_not_pushed(adapter, tmp_path):
    handle = load(tiny_model("llama"), adapter[0])
    with pytest.raises(ValueError, match=r"expected the hub's name of a repository, user/name, got '../up'"):
        handle.push_to_hub("../up")
    with pytest.raises(ValueError, match="dry_run=True pushes nothing: expected the folder"):
        handle.push_to_hub(REPO, dry_run=True)
    with pytest.raises(ValueError, match="dry_run=True pushes nothing: expected no revision or private beside it"):
        handle.push_to_hub(REPO, folder=tmp_path, dry_run=True, revision="next", private=False)
    with pytest.raises(FileNotFoundError, match="is no finished run of lofit-fast train"):
        handle.push_to_hub(REPO, run=tmp_path)
    other = finished_run(tmp_path / "other", handle, adapter_digest="0" * 64)
    with pytest.raises(ValueError, match="is the run of another adapter: its digest is 000000000000"):
        handle.push_to_hub(REPO, run=other)
    (tmp_path / "README.md").write_text("# mine")
    with pytest.raises(ValueError, match=r"README.md is no card of ours to replace"):
        handle.push_to_hub(REPO, folder=tmp_path, dry_run=True)
    with pytest.raises(OSError, match="could not be pushed to the hub: .*dry_run=True writes the folder alone"):
        handle.push_to_hub(REPO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "other"]


def test_a_drawn_picture_and_a_base_of_ones_own(adapter, tmp_path):
    handle = load(tiny_model("llama"), adapter[0])
    handle.model.config._name_or_path = str(tmp_path / "secret" / "place")
    handle.push_to_hub(REPO, folder=tmp_path / "out", dry_run=True)
    card = (tmp_path / "out" / "README.md").read_text()
    # the base is named only where the hub has it
    assert "secret" not in card and "base_model" not in card
    if PICTURES:
        assert (tmp_path / "out" / "heads.png").read_bytes().startswith(b"\x89PNG")
        assert "](heads.png)" in card
