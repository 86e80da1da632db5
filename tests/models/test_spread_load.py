"""Bases that the processes of a run hold together: which are refused, and why."""

import pytest
import torch
import transformers

from lofit_fast.models import spread_load
from lofit_fast.models.load import load_model
from lofit_fast.models.whole_heads import check_heads
from lofit_fast.patching.tensor_parallel import is_tensor_parallel
from tests.several_processes import in_processes
from tests.tiny_families import tiny_config
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer

pytest.importorskip("transformers.distributed.tensor_parallel", reason="transformers without tp_plan")
CPU = {"dtype": "float32", "device": "cpu", "tensor_parallel": True}


def test_one_process_and_an_old_transformers_are_refused(monkeypatch):
    # before anything is looked for
    with pytest.raises(ValueError, match="cuts nothing/here over several processes, and this is one by itself"):
        load_model("nothing/here", **CPU)
    monkeypatch.setattr(spread_load, "_CUTS_WITH", "transformers.of_old")
    with pytest.raises(ImportError, match="has no transformers.of_old, which tensor parallelism needs"):
        load_model("nothing/here", **CPU)


@pytest.mark.slow
def test_what_processes_cannot_hold_together_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    gpt2 = tiny_config("gpt2")
    transformers.AutoModelForCausalLM.from_config(gpt2).save_pretrained(tmp_path / "gpt2")
    for name in ("llama", "gpt2"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    # the base, the number of processes, and what is said
    cases = [
        ("llama", 3, "3 processes do not divide 4 heads of .*llama: .* divides 4 heads and 2 heads of keys"),
        ("llama", 4, "4 processes do not divide 2 heads of keys and values of .*llama"),
        ("gpt2", 2, "transformers has no plan for tensor parallelism of the type 'gpt2'"),
    ]

    def work(name, words):
        with pytest.raises(ValueError, match=words):
            load_model(str(tmp_path / name), **CPU)

    for name, n, words in cases:
        in_processes(n, lambda rank, case=(name, words): work(*case))
    in_processes(2, lambda rank: held_in_parts(str(tmp_path / "llama")))


def held_in_parts(folder):
    model, _ = load_model(folder, **CPU)
    assert is_tensor_parallel(model) and not model.training
    with pytest.raises(ValueError, match="it is quantized. Expected a base of dense weights"):
        spread_load.spread(folder, model.config, True)
    other = "meta" if torch.accelerator.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"got the device {other}: expected "):
        spread_load.check_spread(folder, torch.device(other))


def test_heads_are_counted_where_a_plan_cuts_them():
    config = transformers.LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    rows = {f"layers.*.self_attn.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj")}
    check_heads(config, rows, 3, "3 processes")
    with pytest.raises(ValueError, match="2 processes do not divide 3 heads of keys and values"):
        check_heads(config, rows, 2, "2 processes")
    check_heads(config, dict.fromkeys(rows, "colwise_gather_output"), 4, "4 processes")
