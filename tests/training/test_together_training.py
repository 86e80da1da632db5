"""fit on a tensor-parallel model: all processes take whole batches, and do what one process does."""

import json
import os
import signal
from contextlib import nullcontext

import pytest
import torch
from transformers import TrainerCallback

import lofit_fast as lf
from lofit_fast import ranks, roll_call
from lofit_fast.evaluation.choices import score_choices
from lofit_fast.evaluation.judge import generate_answers
from lofit_fast.models.load import load_model
from lofit_fast.training.arguments import Schedule
from lofit_fast.training.dry_run import dry_run
from lofit_fast.training.objectives import Completions
from lofit_fast.training.stage import train_attachment
from tests.parallel_models import parallel, row_wise, saved, written
from tests.several_processes import in_processes
from tests.tiny_models import FAMILIES as TINY
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import tiny_tokenizer
from tests.training.shared_runs import (
    SHARED,
    UNEVEN,
    WAYS,
    Fail,
    Stop,
    assert_same_outcome,
    changed,
    outcome_of,
    preferred,
)
from tests.training.tiny_runs import HELD_OUT, assert_whole, fit, vectors

pytest.importorskip("torch.distributed.tensor.parallel", reason="torch without torch.distributed")
pytest.importorskip("transformers.distributed.tensor_parallel", reason="transformers without tp_plan")
pytestmark = pytest.mark.distributed

# six heads on three of keys and values, which three processes can share
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny Llama, and its class."""
    folder = tmp_path_factory.mktemp("base")
    return folder, saved(folder, "llama", num_hidden_layers=2)


def alone(base, folder, *, dtype=torch.float32, **options):
    """The outcome in one process."""
    return outcome_of(base[1].from_pretrained(base[0], dtype=dtype).eval(), folder, **options)


def together(base, folder, n=2, *, dtype=torch.float32, limit=60.0, **options):
    """The outcome in each of n processes that hold the model together."""
    return in_processes(
        n,
        lambda rank: outcome_of(parallel(*base, n, dtype), folder, **options),
        limit=limit,
        timeout=limit,
    )


# a batch that two do not divide, and a last one of one example
PLAIN = lf.Engine(attention="eager", packing=False, narrow=False)
QUICK = {"examples": UNEVEN[:4], "recipe": changed(batch_size=3, select_epochs=1, tune_epochs=1), "engine": PLAIN}
WHOLE = {"examples": UNEVEN[:7], "eval_data": HELD_OUT, "recipe": changed(batch_size=3)}


@pytest.mark.parametrize("data", [QUICK, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=["quick", "judged"])
def test_two_processes_do_what_one_does(base, tmp_path, data):
    expected = alone(base, tmp_path / "one", **data)
    first, second = together(base, tmp_path / "two", **data)
    assert_same_outcome(first, expected)
    # to the last bit, or they would drift apart
    assert first[2] == second[2] and all(torch.equal(a, b) for a, b in zip(first[3], second[3], strict=True))
    files = [{p.relative_to(f).as_posix() for p in f.rglob("*")} for f in (tmp_path / "one", tmp_path / "two")]
    assert files[0] == files[1]
    assert_whole(tmp_path / "two")
    # the same run: one process could go on with it
    states = [json.loads((tmp_path / name / "state.json").read_text()) for name in ("one", "two")]
    assert states[0]["identity"] == states[1]["identity"]
    if "eval_data" in data:
        assert states[1]["metrics"]["tune"]["exact_match"] == states[0]["metrics"]["tune"]["exact_match"]
    model = base[1].from_pretrained(base[0]).eval()
    handle = lf.load(model, tmp_path / "two" / "adapter", strict=True)
    assert all(torch.equal(a, b) for a, b in zip(vectors(handle), first[3], strict=True))


# six heads, each with its own keys and values, of families that plans cut in other ways
EACH = {**GROUPED, "num_key_value_heads": 6}
FAMILIES = {
    "gemma": (2, "gemma", {}),
    "gemma2, three processes": (3, "gemma2", GROUPED),
    "gemma3": (2, "gemma3", {}),
    "llama, three processes": (3, "llama", GROUPED),
    "mistral": (2, "mistral", {}),
    "qwen2": (2, "qwen2", {}),
    "qwen3": (2, "qwen3", {}),
    # projections of whole inputs
    "phi3": (3, "phi3", EACH),
    "gpt_neox": (2, "gpt_neox", EACH),
    # experts, some inner rows of each
    "mixtral": (2, "mixtral", EACH),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    n, name, changes = FAMILIES[family]
    base = tmp_path, (saved if name in TINY else written)(tmp_path, name, **changes)
    data = {"examples": UNEVEN, "eval_data": HELD_OUT}
    expected = alone(base, tmp_path / "one", **data)
    for got in together(base, tmp_path / "several", n, **data):
        assert_same_outcome(got, expected)


OWN_WAYS = {
    "saliency of some": {"recipe": changed(select="saliency", select_examples=5, accumulation_steps=2)},
    "upper layers": {"recipe": changed(min_layer=1)},
    # all of one process's
    "given heads": {"heads": [(0, 0), (1, 1)]},
    "one example": {"examples": UNEVEN[:1]},
    "preferences": {"fitting": preferred, "recipe": changed(batch_size=4)},
    "preferences by saliency": {"fitting": preferred, "recipe": changed(batch_size=4, select="saliency")},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", [*WAYS, *OWN_WAYS])
def test_every_way_to_train(base, tmp_path, way):
    how = {**WAYS, **OWN_WAYS}[way]
    if how.get("fitting") is preferred:
        pytest.importorskip("trl")
    else:
        how = {"examples": UNEVEN, **how}
    expected = alone(base, tmp_path / "one", **how)
    for got in together(base, tmp_path / "two", **how):
        assert_same_outcome(got, expected, 1e-12 if how.get("dtype") == torch.float64 else 1e-5)


@pytest.mark.slow
def test_fast_settings_take_what_there_is(base, tmp_path):
    how = {"recipe": lf.Recipe.fast(top=3, tune_epochs=2, batch_size=6), "examples": UNEVEN}
    # "auto" is no products in 8 bits, and no cache
    expected = alone(base, tmp_path / "one", **how)
    for got in together(base, tmp_path / "two", engine=lf.Engine.fast(), **how):
        assert_same_outcome(got, expected)


@pytest.mark.slow
def test_a_run_of_one_process_is_gone_on_with_together(base, tmp_path):
    how = {"examples": UNEVEN, "engine": PLAIN}
    expected = alone(base, tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        alone(base, tmp_path / "cut", callbacks=[Stop()], **how)
    for got in together(base, tmp_path / "cut", **how):
        assert_same_outcome(got, expected)


@pytest.mark.slow
def test_a_choice_that_runs_share_and_layers_that_are_computed_twice(base, tmp_path):
    def checkpointed(model, folder, recipe, **options):
        model.gradient_checkpointing_enable()
        return fit(model, folder, recipe, **options)

    how = {"examples": UNEVEN, "fitting": checkpointed}
    expected = alone(base, tmp_path / "one", step1_dir=tmp_path / "shared one", **how)
    # both take it from there, and the second trains none
    for name in ("two", "three"):
        for got in together(base, tmp_path / name, step1_dir=tmp_path / "shared", **how):
            assert got[0] == expected[0]
            assert all((a - b).abs().max() <= 1e-5 for a, b in zip(got[3], expected[3], strict=True))


@pytest.mark.slow
def test_answers_and_choices_are_those_of_one_process(base):
    prompts, choices = ["ab=", "c", "def+"], [["x", "yz"], ["q", "rs", "t"], ["u", "v"]]

    def asked(model):
        handle = lf.patch(model, lf.LofitConfig(offset=[(0, 1), (1, 3)], init_std=0.5))
        answers = generate_answers(model, tiny_tokenizer(), prompts, max_new_tokens=4, batch_size=2)
        scores = score_choices(model, tiny_tokenizer(), prompts, choices)
        handle.unpatch()
        return answers, scores

    answers, scores = asked(base[1].from_pretrained(base[0]).eval())

    def work(rank):
        model = parallel(*base, 2)
        found = asked(model)
        with pytest.raises(ValueError, match="expected the same prompts in every process"):
            generate_answers(model, tiny_tokenizer(), prompts[rank:], max_new_tokens=4)
        return found

    for got, its in in_processes(2, work):
        assert got == answers
        assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(its, scores, strict=True))


@pytest.mark.slow
def test_a_model_that_torch_has_cut(tmp_path):
    expected = outcome_of(tiny_model("llama"), tmp_path / "one", examples=UNEVEN, eval_data=HELD_OUT)

    def work(rank):
        return outcome_of(row_wise(tiny_model("llama"), 2), tmp_path / "two", examples=UNEVEN, eval_data=HELD_OUT)

    for got in in_processes(2, work):
        assert_same_outcome(got, expected)


@pytest.mark.slow
def test_in_16_bits_and_with_dropout_processes_stay_alike(tmp_path):
    base = tmp_path, saved(tmp_path, "llama", attention_dropout=0.1)
    expected = alone(base, tmp_path / "one", dtype=torch.bfloat16)
    first, second = together(base, tmp_path / "two", dtype=torch.bfloat16)
    assert first[0] == second[0] and first[2] == second[2]
    assert all(torch.equal(a, b) for a, b in zip(first[3], second[3], strict=True))
    # other draws, and sums in another order of 8 bits
    for mine, its in zip(first[2], expected[2], strict=True):
        assert abs(mine["loss"] - its["loss"]) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_it_goes_on_with_any_number_of_processes(tmp_path, processes):
    base = tmp_path / "base", saved(tmp_path / "base", "llama", **GROUPED)
    expected = alone(base, tmp_path / "whole")

    def cut(rank):
        with pytest.raises(KeyboardInterrupt):
            outcome_of(parallel(*base, 3), tmp_path / "cut", callbacks=[Stop()])

    in_processes(3, cut)
    if processes == 2:
        # half of three heads of keys and values is none
        return
    again = [alone(base, tmp_path / "cut")] if processes == 1 else together(base, tmp_path / "cut", 3)
    for got in again:
        assert_same_outcome(got, expected)


def killed_at(step):
    """A callback that kills its process in a step of step 2."""

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if args.learning_rate == SHARED.tune_lr and state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return Kill()


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on(base, tmp_path, monkeypatch):
    monkeypatch.setattr(roll_call, "_GRACE", 0.5)
    recipe = changed(select="random")
    whole = alone(base, tmp_path / "whole", recipe=recipe)

    def work(rank):
        with pytest.raises(ranks.ElsewhereError) as found:
            outcome_of(parallel(*base, 2), tmp_path / "cut", recipe, callbacks=[killed_at(3)] * rank)
        return str(found.value)

    said, _ = in_processes(2, work, dying={1})
    assert "process 1 (" in said and "has ended or does not answer" in said
    assert_whole(tmp_path / "cut")
    for got in together(base, tmp_path / "cut", recipe=recipe):
        assert_same_outcome(got, whole)


@pytest.mark.slow
def test_one_that_fails_is_named_by_the_others(base, tmp_path, monkeypatch):
    monkeypatch.setattr(roll_call, "_GRACE", 0.5)

    def work(rank):
        with pytest.raises((OSError, ranks.ElsewhereError)) as found:
            outcome_of(parallel(*base, 2), tmp_path / "run", changed(select="random"), callbacks=[Fail()] * rank)
        return str(found.value)

    first, second = in_processes(2, work)
    assert second == "disk full" and "process 1 failed in training: OSError: disk full" in first


REFUSED = {
    "prefix": ({"engine": lf.Engine(prefix_cache_gb=1.0)}, "prefix_cache_gb=1.0 was asked for, but the model is tens"),
    "prompts": (
        {"engine": lf.Engine(prompt_cache_gb=1.0), "recipe": changed(positions="answer")},
        "prompt_cache_gb=1.0 was asked for",
    ),
    "products": ({"engine": lf.Engine(frozen_products="int8")}, "frozen_products=int8 was asked for, but the model is"),
    "compiled": ({"engine": lf.Engine(compile=True)}, "compile=True was asked for, but the model is tensor-parallel"),
    "pages": ({"engine": lf.Engine(large_pages=True)}, "large_pages=True was asked for"),
    "verify": ({"engine": lf.Engine(verify=True)}, "verify=True was asked for, but the model is tensor-parallel"),
    "FSDP": ({"asked": "ACCELERATE_USE_FSDP"}, "configured for FSDP, but the model is tensor-parallel already"),
    "ZeRO": ({"asked": "ACCELERATE_USE_DEEPSPEED"}, "configured for DeepSpeed, but the model is tensor-parallel alrea"),
    "other data": ({"uneven": True}, "expected the same training data in every process"),
    "apart": ({"apart": True}, "cut over 2 processes, and the run has 1"),
}


def test_what_a_tensor_parallel_model_cannot_have_is_refused_before_anything_is_written(base, tmp_path):
    def work(rank):
        model = parallel(*base, 2)
        before = {name: id(module) for name, module in model.named_modules()}
        for options, words in REFUSED.values():
            how = dict(options)
            how["examples"] = UNEVEN[rank:] if how.pop("uneven", False) else UNEVEN
            asked, apart = how.pop("asked", None), how.pop("apart", False)
            os.environ |= {asked: "true"} if asked else {}
            with pytest.raises(ValueError, match=words), ranks.apart() if apart else nullcontext():
                fit(model, tmp_path / "run", **{"recipe": SHARED, **how})
            os.environ.pop(asked, None) if asked else None
        assert before == {name: id(module) for name, module in model.named_modules()}
        handle = lf.patch(model, lf.LofitConfig(offset=[(0, 1)]))
        with pytest.raises(ValueError, match="cannot train a Peer in a tensor-parallel model"):
            train_attachment(Peer(model), tiny_tokenizer(), Completions(UNEVEN), Schedule(1e-2, 1), output_dir=tmp_path)
        # by the first alone, and by another alone: nobody waits
        if rank == 0:
            handle.save(tmp_path / "adapter")

    in_processes(2, work)
    assert not (tmp_path / "run").exists() and (tmp_path / "adapter" / "adapter_config.json").exists()


class Peer:
    """Another method's attachment."""

    def __init__(self, model):
        self.model = model


@pytest.mark.slow
def test_data_parallel_beside_it_is_refused(tmp_path):
    def work(rank):
        from torch.distributed import init_device_mesh

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tp"))
        model = row_wise(tiny_model("llama"), 2, mesh["tp"])
        with pytest.raises(ValueError, match="cut over 2 processes, and the run has 4. Data parallelism beside"):
            fit(model, tmp_path / "run")

    in_processes(4, work)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_attachment_trains_by_itself_and_a_dry_run_changes_nothing(base, tmp_path):
    def trained(model):
        seen = dry_run(model, tiny_tokenizer(), Completions(UNEVEN), SHARED).as_dict()["engine"]
        handle = lf.patch(model, lf.LofitConfig(offset=[(0, 1), (1, 3)]))
        how = {"output_dir": tmp_path / "work", "progress": False}
        losses = train_attachment(handle, tiny_tokenizer(), Completions(UNEVEN), Schedule(1e-2, 2), **how)["loss"]
        return seen, losses, vectors(handle)

    engine, losses, expected = trained(base[1].from_pretrained(base[0]).eval())
    for seen, its, got in in_processes(2, lambda rank: trained(parallel(*base, 2))):
        assert seen == engine and torch.allclose(torch.tensor(its), torch.tensor(losses), rtol=0, atol=1e-5)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(got, expected, strict=True))


def with_parts_of_logits(model, rank):
    """The model with logits that are others in the second process, as of a head that nobody has put together."""
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * (1 + rank))


def with_other_vectors(model, rank):
    """The model with an update of the second process's own."""
    step = torch.optim.AdamW.step

    def stepping(self, *args, **options):
        result = step(self, *args, **options)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] += 1e-6 * rank
        return result

    torch.optim.AdamW.step = stepping


@pytest.mark.slow
@pytest.mark.parametrize("plant", [with_parts_of_logits, with_other_vectors])
def test_processes_that_come_apart_are_noticed_at_the_first_step(base, tmp_path, plant):
    def work(rank):
        model = parallel(*base, 2)
        plant(model, rank)
        with pytest.raises(ValueError, match="after step 1 their (losses|vectors) differ .process 0: "):
            fit(model, tmp_path / "run", examples=UNEVEN, engine=PLAIN)
        assert lf.handle_of(model) is None

    in_processes(2, work)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(1200)
def test_a_real_model_learns_the_same(tmp_path):
    """SmolLM2 has nine heads, three with keys and values."""
    names = ("Ann", "Bob", "Cid", "Dora", "Eve")
    pairs = zip(names, names[::-1], strict=True)
    rows = [{"prompt": f"Q: Who is {x}'s friend?\nA:", "completion": f" {y}" * (1 + len(x) % 2)} for x, y in pairs]
    recipe = changed(top=5, select_epochs=1, tune_epochs=1, batch_size=2)

    def real(folder, **how):
        model, tokenizer = load_model("smollm2", dtype="float32", device="cpu", **how)
        options = {"output_dir": folder, "engine": PLAIN, "progress": False}
        return outcome_of(model, folder, fitting=lambda *_: lf.fit(model, tokenizer, rows, recipe, **options))

    expected = real(tmp_path / "one")
    several = in_processes(3, lambda rank: real(tmp_path / "three", tensor_parallel=True), limit=600.0, timeout=600.0)
    for got in several:
        assert_same_outcome(got, expected)
