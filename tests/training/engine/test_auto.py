"""What "auto" becomes: rules on the device, the model and the work, the same in every process and without a clock."""

import time

import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import lofit_fast as lf
import lofit_fast.cpu.attention as grouped
from benchmarks.peers import loreft
from lofit_fast.data.encode import IGNORED
from lofit_fast.data.pack import GROUPED
from lofit_fast.training import Engine
from lofit_fast.training.engine import auto
from lofit_fast.training.engine.auto import pays_to_compile, settle
from lofit_fast.training.engine.packing_trial import packs
from tests.tiny_models import tiny_model, tokens
from tests.training.engine.engine_families import family_model

ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens(2, 8)]


# a stand-in for flash attention, which tells packed examples apart by their positions
FLASH = "attention_of_packed_rows"
transformers.AttentionInterface.register(FLASH, sdpa_attention_forward)
transformers.AttentionMaskInterface.register(FLASH, sdpa_mask)
# and one that does not
LEAKY = "attention_that_leaks"
transformers.AttentionInterface.register(LEAKY, sdpa_attention_forward)
transformers.AttentionMaskInterface.register(
    LEAKY, lambda *args, mask_function=None, **options: sdpa_mask(*args, **options)
)


@pytest.fixture
def handle(llama):
    return lf.patch(llama, lf.LofitConfig(scale="all"))


@pytest.mark.parametrize(
    ("engine", "attention", "compiled"),
    [
        (Engine(), GROUPED, False),
        (Engine(attention="sdpa"), "sdpa", False),
        (Engine(compile=True), GROUPED, True),
        (Engine(attention="eager", compile=True), "eager", True),
    ],
)
def test_auto_settles(handle, engine, attention, compiled):
    settled, said = settle(handle, engine, ROWS, 0, 2, 3)
    assert "auto" not in vars(settled).values()
    assert (settled.attention, settled.compile) == (attention, compiled)
    assert attention in said and ("not compiled" in said) is not compiled
    # the model keeps what it has until it is prepared
    assert handle.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("engine", "steps", "narrow", "large_pages"),
    [
        (Engine(compile=False), 10, True, False),
        (Engine(attention="sdpa", compile=True), 999, False, True),
        (Engine(attention="sdpa", compile=True), 1000, True, True),
        (Engine(attention="sdpa", compile=True, narrow=True, large_pages=False), 10, True, False),
        (Engine(compile=False, narrow=False, large_pages=True), 10, False, True),
    ],
)
def test_auto_settles_what_costs_once(handle, engine, steps, narrow, large_pages):
    settled, _ = settle(handle, engine, ROWS, 0, 2, steps)
    assert (settled.narrow, settled.large_pages) == (narrow, large_pages)


def test_auto_asks_no_clock(handle, monkeypatch):
    def asked(*_):
        raise AssertionError("a choice took the time of something")

    for clock in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(time, clock, asked)
    assert settle(handle, Engine(), ROWS, 0, 2, 1000) == settle(handle, Engine(), ROWS, 0, 2, 1000)


def test_auto_compiles_from_so_much_work_on(llama, monkeypatch):
    weights = sum(parameter.numel() for parameter in llama.model.layers.parameters())
    enough = int(-(-auto.COMPILE_FROM // (4 * weights)))
    cpu = torch.device("cpu")
    monkeypatch.setattr(auto.shutil, "which", lambda name: "/bin/g++" if name == "g++" else None)
    assert pays_to_compile(llama, cpu, enough)
    assert not pays_to_compile(llama, cpu, enough - 1)
    # no GPU has said that it pays there
    assert not pays_to_compile(llama, torch.device("cuda"), enough)
    monkeypatch.setattr(auto.shutil, "which", lambda name: None)
    assert not pays_to_compile(llama, cpu, enough)


def examples(*lengths, shared=0):
    beginning = tokens(1, shared + 1, 99)[0].tolist()[:shared]
    rows = [beginning + tokens(1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]
    return [{"input_ids": ids, "labels": [IGNORED] * (len(ids) - 1) + ids[-1:]} for ids in rows]


@pytest.mark.parametrize(
    ("attention", "packing", "rows", "expected"),
    [
        (GROUPED, "auto", examples(60, 60, 60, 60, shared=20), True),
        (GROUPED, "auto", examples(64, 64, 64, 64), False),
        (GROUPED, "auto", examples(80, 60, 40), True),
        (GROUPED, True, examples(60, 60, 60, 60), True),
        (GROUPED, False, examples(80, 60, 40), False),
        ("sdpa", "auto", examples(80, 60, 40), False),
        ("sdpa", True, examples(80, 60, 40), True),
        (FLASH, "auto", examples(60, 60), True),
    ],
)
def test_auto_packs_where_it_saves(handle, attention, packing, rows, expected, monkeypatch):
    monkeypatch.setattr(auto, "packs", lambda name: packs(name) or name == FLASH)
    engine = Engine(attention=attention, compile=False, packing=packing)
    settled, said = settle(handle, engine, rows, 0, len(rows), 1)
    assert settled.packing is expected
    assert ("packed" in said) is expected


def test_auto_does_not_pack_what_it_does_not_know(handle):
    handle.model.config.use_bidirectional_attention = True
    engine = Engine(attention=GROUPED, compile=False)
    assert settle(handle, engine, examples(80, 60, 40), 0, 3, 1)[0].packing is False


def test_auto_refuses_packing_that_would_be_wrong(handle):
    handle.model.config.use_bidirectional_attention = True
    engine = Engine(attention=GROUPED, compile=False, packing=True)
    with pytest.raises(ValueError, match="packing with 'lofit_grouped' attention was asked for, but "):
        settle(handle, engine, examples(80, 60, 40), 0, 3, 1)


def test_auto_does_not_pack_for_who_must_know_examples_apart(llama):
    peer = loreft.make(llama)
    engine = Engine(attention=GROUPED, compile=False)
    assert settle(peer, engine, examples(80, 60, 40), 0, 3, 1)[0].packing is False


def test_auto_does_not_pack_what_leaks(handle, monkeypatch):
    monkeypatch.setattr(auto, "packs", lambda name: True)
    assert settle(handle, Engine(attention=LEAKY), examples(80, 60), 0, 2, 1)[0].packing is False
    with pytest.raises(ValueError, match="packing with 'attention_that_leaks' .* was asked for, but in a packed"):
        settle(handle, Engine(attention=LEAKY, packing=True), examples(80, 60), 0, 2, 1)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_9", "sdpa"])
def test_an_attention_that_cannot_be_used_is_refused_before_a_run(name):
    model = family_model("gpt_oss")
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"attention '{name}' cannot be used here: "):
        settle(handle, Engine(attention=name), examples(8, 6), 0, 2, 1)
    assert model.config._attn_implementation == "eager"
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_an_attention_that_computes_something_else_is_refused(handle, monkeypatch):
    wrong = "attention_of_a_test"
    transformers.AttentionInterface.register(
        wrong, lambda *args, **options: [2 * sdpa_attention_forward(*args, **options)[0], None]
    )
    transformers.AttentionMaskInterface.register(wrong, sdpa_mask)
    with pytest.raises(ValueError, match="LlamaForCausalLM's logits are .* away from its own"):
        settle(handle, Engine(attention=wrong), examples(8, 6), 0, 2, 1)
    # nor does "auto" pick the grouped one where it would
    mix = grouped._mix
    monkeypatch.setattr("lofit_fast.cpu.attention._mix", lambda weights, value: 2 * mix(weights, value))
    assert settle(handle, Engine(), examples(8, 6), 0, 2, 1)[0].attention == "sdpa"


def test_a_model_with_attention_code_of_its_own_keeps_it(handle, monkeypatch):
    kind = type(handle.model)
    for each in {type(m) for m in handle.model.modules() if hasattr(m, "set_attn_implementation")}:
        monkeypatch.setattr(each, "_can_set_attn_implementation", classmethod(lambda cls: False))
    assert settle(handle, Engine(), examples(8, 6), 0, 2, 1)[0].attention == "sdpa"
    with pytest.raises(ValueError, match=f"{kind.__name__} has attention code of its own, and stays with 'sdpa'"):
        settle(handle, Engine(attention="eager"), examples(8, 6), 0, 2, 1)


@pytest.mark.parametrize(("heads", "groups"), [(7, 2), (7, 3), (4, 8)])
def test_heads_that_cannot_share_are_refused_with_both_numbers(heads, groups):
    model = tiny_model("llama", hidden_size=56, num_attention_heads=heads, num_key_value_heads=groups, head_dim=8)
    handle = lf.patch(model, lf.LofitConfig(offset="all"))
    with pytest.raises(ValueError, match=f"{heads} query heads on {groups} heads of keys and values, and cannot run"):
        settle(handle, Engine(), examples(8, 6), 0, 2, 1)
