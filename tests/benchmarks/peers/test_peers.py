"""The one tester that every peer goes through, in each of the two ways a row of the table can be used.

Timed peers are attached to a copy of a model and trained by steps. Compared peers are made as an Attachment, which can
be switched off and taken out. What a peer computes is in its own test file.
"""

import copy
import math

import pytest
import torch

import lofit_fast as lf
from benchmarks.peers.peer import Absent
from benchmarks.peers.table import COMPARED, PEERS, TIMED
from lofit_fast.tasks.task import Preference
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.objectives import Completions, Preferences
from lofit_fast.training.stage import train_attachment
from tests.benchmarks.peers.edited import CONTRASTS, logits, shake
from tests.tiny_models import HEAD_DIM, tiny_model, tokens
from tests.tiny_tokenizers import tiny_tokenizer

EXAMPLES = [{"prompt": c.prompt, "completion": c.right} for c in CONTRASTS]
TRAINED = [name for name, peer in COMPARED.items() if peer.kind == "trained"]
# compiling says nothing about the arithmetic that the plain hook does not say, and takes a minute
STEPPED = [name for name in TIMED if name != "compiled_hook"]
STEPS = {"scale": {"scale": [(0, 1), (2, 3)]}, "offset": {"offset": [(0, 1), (2, 0), (2, 3)]}}
OF_PEFT = {"lora", "lora_all", "ia3", "beft"}
# rounding of a float32 loss
NEAR = 1e-5


def test_every_peer_is_timed_or_compared_and_has_its_own_label():
    assert PEERS.keys() == TIMED.keys() | COMPARED.keys()
    assert len({peer.label for peer in PEERS.values()}) == len(PEERS)
    assert {name for name, peer in PEERS.items() if peer.computes == "ours"} <= TIMED.keys()
    assert all(COMPARED[name].kind in ("trained", "fitted") for name in COMPARED)


@pytest.fixture(autouse=True)
def installed(request):
    """Skip what is PEFT's where that is not installed."""
    named = getattr(request.node, "callspec", None)
    if named and not OF_PEFT.isdisjoint(map(str, named.params.values())):
        pytest.importorskip("peft")


def vectors(component, std=0.0, seed=3):
    draw = torch.Generator().manual_seed(seed)
    heads = {}
    for layer, head in STEPS[component][component]:
        heads.setdefault(layer, []).append(head)
    return {(n, component): (hs, std * torch.randn(len(hs), HEAD_DIM, generator=draw)) for n, hs in heads.items()}


def attached(name, model, values):
    try:
        return TIMED[name].attach(model, values)
    except Absent as reason:
        pytest.skip(str(reason))


def loss_of(model):
    ids = tokens()
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias")
@pytest.mark.parametrize("component", STEPS)
@pytest.mark.parametrize("name", STEPPED)
def test_a_timed_peer_starts_as_the_base_model_and_learns(name, component):
    model = tiny_model("llama")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    base = loss_of(copy.deepcopy(model)).item()
    peer = attached(name, model, vectors(component))
    assert loss_of(peer.model).item() == pytest.approx(base, abs=NEAR)
    parameters = {id(p) for p in peer.parameters}
    assert {id(p) for p in peer.model.parameters() if p.requires_grad} <= parameters
    losses = []
    optimizer = torch.optim.Adam(peer.parameters, lr=0.05)
    for _ in range(5):
        loss = loss_of(peer.model)
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in peer.parameters)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    frozen = {key: p for key, p in model.named_parameters() if key in before and id(p) not in parameters}
    assert all(torch.equal(p, before[key]) for key, p in frozen.items())


@pytest.mark.parametrize("component", STEPS)
@pytest.mark.parametrize("name", [name for name in STEPPED if TIMED[name].computes == "ours"])
def test_a_timed_peer_that_computes_ours_takes_the_vectors_it_is_given(name, component):
    values = vectors(component, std=0.5)
    expected = TIMED["hook"].attach(tiny_model("llama"), values)
    given, assigned = (attached(name, tiny_model("llama"), start) for start in (values, vectors(component)))
    assigned.assign(values)
    for peer in (given, assigned):
        assert (loss_of(peer.model) - loss_of(expected.model)).abs() <= NEAR
        if component == "scale":
            assert peer.penalty().item() == pytest.approx(expected.penalty().item(), rel=1e-6)
        else:
            assert peer.penalty is None


def test_a_timed_peer_that_computes_something_else_has_no_vectors():
    for name, peer in TIMED.items():
        if peer.computes == "other" and name != "floor":
            assert attached(name, tiny_model("llama"), vectors("offset")).assign is None


def made(name, model, **options):
    peer = COMPARED[name]
    given = (tiny_tokenizer(), CONTRASTS) if peer.kind == "fitted" else ()
    return peer.make(model, *given, seed=3, **{**peer.options, **options})


@pytest.fixture(params=COMPARED)
def name(request):
    """Each compared peer in turn."""
    return request.param


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_compared_peer_can_be_switched_off_and_taken_out(name, family):
    model = tiny_model(family)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    base, modules = logits(model), dict(model.named_modules())
    frozen = {key: p.requires_grad for key, p in model.named_parameters()}
    hooks = {key: (len(m._forward_hooks), len(m._forward_pre_hooks)) for key, m in modules.items()}
    attachment = made(name, model)
    shake(attachment)
    assert attachment.model is model
    assert not torch.equal(logits(model), base)
    with attachment.disabled():
        assert torch.equal(logits(model), base)
    assert not torch.equal(logits(model), base)
    assert attachment.unpatch() is model
    assert dict(model.named_modules()) == modules
    assert {key: p.requires_grad for key, p in model.named_parameters()} == frozen
    assert {key: (len(m._forward_hooks), len(m._forward_pre_hooks)) for key, m in modules.items()} == hooks
    assert not hasattr(model, "peft_config")
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "loreft"])
def test_a_trained_peer_starts_as_the_base_model(name):
    """LoReFT starts from a random edit, as its paper has it."""
    model = tiny_model("llama")
    base = logits(model)
    made(name, model)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_peer_learns_and_trains_nothing_else(name, tmp_path):
    model = tiny_model("llama")
    before = {key: p.clone() for key, p in model.named_parameters()}
    attachment = made(name, model)
    own = {id(p) for p in attachment.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == own
    assert attachment.n_parameters() == sum(p.numel() for p in attachment.parameters())
    schedule, how = Schedule(COMPARED[name].lr, 6, batch_size=4), {"output_dir": tmp_path, "progress": False}
    loss = train_attachment(attachment, tiny_tokenizer(), Completions(EXAMPLES), schedule, **how)["loss"]
    assert loss[-1] < loss[0] - 0.02
    attachment.unpatch()
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_peer_learns_preferences(name, tmp_path):
    pytest.importorskip("trl")
    model = tiny_model("llama")
    before = logits(model)
    attachment = made(name, model)
    preferences = [Preference(c.prompt, c.right, (c.wrong,)) for c in CONTRASTS]
    schedule, how = Schedule(COMPARED[name].lr, 4, batch_size=4), {"output_dir": tmp_path, "progress": False}
    trained = train_attachment(attachment, tiny_tokenizer(), Preferences(preferences), schedule, **how)
    # the loss of a model that is its own reference is log 2
    assert trained["loss"][-1] < trained["loss"][0] < math.log(2) + 0.1
    assert trained["examples_per_s"] > 0
    attachment.unpatch()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_peer_refuses_an_edited_model(name, llama):
    handle = lf.patch(llama, lf.LofitConfig(offset="all"))
    with pytest.raises(ValueError, match="edited already"):
        made(name, llama)
    handle.unpatch()
    made(name, llama)
    with pytest.raises(ValueError, match="edited already"):
        made(name, llama)


def test_a_compared_peer_has_tuning_settings_it_takes(name):
    peer = COMPARED[name]
    assert len(peer.tuning) >= 4
    assert len({str(setting) for setting in peer.tuning}) == len(peer.tuning)
    for setting in peer.tuning:
        attachment = made(name, tiny_model("llama"), **{k: v for k, v in setting.items() if k != "lr"})
        assert attachment.n_parameters() > 0
    assert (peer.lr > 0) == (peer.kind == "trained")
    assert {"lr"} <= set(peer.tuning[0]) or peer.kind == "fitted"
