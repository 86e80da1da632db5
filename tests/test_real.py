"""A real model, SmolLM2: patched it is the base bit for bit at zero, and a hook-based LoFiT everywhere else."""

import pytest
import torch

import lofit_fast as lf
from benchmarks.peers.hook import HookLofit, vectors_of
from lofit_fast.data.encode import encode
from lofit_fast.models.load import load_model
from lofit_fast.training import CompletionCollator
from tests.oracle import randomize

pytestmark = pytest.mark.real

EXAMPLES = [
    {"prompt": "Q: What is the capital of France?\nA:", "completion": " Paris"},
    {"prompt": "Ann is Bob's mother. Bob is Cid's father. Ann is Cid's", "completion": " grandmother"},
]
# scales and offsets on different, overlapping heads of low, middle and top layers
CONFIG = lf.LofitConfig(scale=[(0, 0), (11, 3), (11, 8), (29, 1)], offset=[(2, 5), (11, 3), (28, 0), (29, 1)])


@pytest.fixture(scope="module")
def loaded():
    """(model, tokenizer), the model in float32."""
    return load_model("smollm2", dtype="float32", device="cpu")


@pytest.fixture
def model(loaded):
    """The model, unpatched after each test."""
    yield loaded[0]
    if handle := lf.handle_of(loaded[0]):
        handle.unpatch()


@pytest.fixture
def batch(loaded):
    """Two padded examples; labels on the answers."""
    rows = [encode(loaded[1], example, None) for example in EXAMPLES]
    full = CompletionCollator(loaded[1].pad_token_id)(rows)
    return {key: full[key] for key in ("input_ids", "attention_mask", "labels")}


@torch.no_grad()
def logits_of(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def assert_base_at_zero(model, batch, config):
    base = logits_of(model, batch)
    handle = lf.patch(model, config)
    assert len(handle.layers) == 30
    assert logits_of(model, batch).equal(base)
    with handle.folded():
        assert logits_of(model, batch).equal(base)
    # the path that training takes, too
    assert model(**batch, use_cache=False).logits.detach().equal(base)
    handle.unpatch()
    assert logits_of(model, batch).equal(base)


def test_real_at_zero_is_the_base(model, batch):
    assert_base_at_zero(model, batch, lf.LofitConfig(scale="all", offset="all", init_std=0.0))


# in 16 bits a layer with both has a longer reduction: that one is held to the accuracy rule below
@pytest.mark.slow
@pytest.mark.parametrize("component", ["scale", "offset"])
def test_real_at_zero_is_the_base_in_bfloat16(batch, component):
    model, _ = load_model("smollm2", dtype="bfloat16", device="cpu")
    # an attention that runs the same with and without a gradient: ours does not, and differs by rounding
    model.set_attn_implementation("eager")
    assert_base_at_zero(model, batch, lf.LofitConfig(**{component: "all"}, init_std=0.0))


@pytest.mark.slow
def test_real_with_both_at_zero_is_as_accurate_as_the_base_in_bfloat16(loaded, batch):
    narrow, _ = load_model("smollm2", dtype="bfloat16", device="cpu")
    base = logits_of(narrow, batch).float()
    # the same weights, the same rounding of them, computed in float32
    exact = logits_of(load_model("smollm2", dtype="bfloat16", device="cpu")[0].float(), batch)
    lf.patch(narrow, lf.LofitConfig(scale="all", offset="all", init_std=0.0))
    error, allowed = ((x - exact).abs().max() for x in (logits_of(narrow, batch).float(), base))
    assert error <= 2 * allowed


def outputs(model, batch, parameters):
    # the loss from the logits: transformers computes its own in float32, whatever the model is
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    wanted = batch["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, ignore_index=-100)
    return logits.detach(), torch.autograd.grad(loss, parameters)


def assert_equals_the_hook(model, batch, config, std, dtype, tolerance):
    base = logits_of(model, batch)
    handle = lf.patch(model, config)
    model.to(dtype)
    randomize(handle, std)
    vectors = vectors_of(handle)
    names = [
        (number, name)
        for number, layer in handle.layers.items()
        for name in ("scale", "offset")
        if getattr(layer, name) is not None
    ]
    logits, gradients = outputs(model, batch, [getattr(handle.layers[number], name) for number, name in names])
    handle.unpatch()
    hook = HookLofit(model, vectors, dtype)
    try:
        expected, wanted = outputs(model, batch, [hook.parameters[key] for key in names])
    finally:
        hook.remove()
    size = expected.abs().max()
    assert (expected - base).abs().max() > 1e-2 * size
    assert (logits - expected).abs().max() <= tolerance * size
    largest = max(gradient.abs().max() for gradient in wanted)
    assert largest > 0
    for key, got, gradient in zip(names, gradients, wanted, strict=True):
        assert (got - gradient).abs().max() <= 10 * tolerance * largest, key


# offsets of 0.5 on every head of every layer drown the model: there a hook itself is 3e-5 from float64
@pytest.mark.parametrize(
    ("config", "std"),
    [
        (CONFIG, 0.5),
        pytest.param(lf.LofitConfig(scale="all"), 0.5, marks=pytest.mark.slow),
        pytest.param(lf.LofitConfig(offset="all"), 0.1, marks=pytest.mark.slow),
    ],
    ids=["mixed", "scale", "offset"],
)
def test_real_equals_the_hook(model, batch, config, std):
    assert_equals_the_hook(model, batch, config, std, torch.float32, 1e-5)


@pytest.mark.slow
def test_real_equals_the_hook_in_float64(model, batch):
    # one row: half the time, and the padding has had its test
    batch = {key: value[1:] for key, value in batch.items()}
    try:
        assert_equals_the_hook(model, batch, CONFIG, 0.5, torch.float64, 1e-10)
    finally:
        # exact: every one of these float64 was a float32
        model.float()


@pytest.mark.slow
def test_the_reference_of_dpo_is_an_untouched_copy(loaded, model):
    datasets = pytest.importorskip("datasets")
    tokenizer, copy = loaded[1], load_model("smollm2", dtype="float32", device="cpu")[0]
    texts = {
        "prompt": ["Q: What is the capital of France? A:", "Q: Can pigs fly? A:"],
        "chosen": [" Paris.", " No, pigs have no wings."],
        "rejected": [" Rome, as far as I know.", " Yes."],
    }
    handle = lf.patch(model, CONFIG)
    randomize(handle)
    done = lf.reference_logprobs(handle, datasets.Dataset.from_dict(texts), tokenizer)
    for side in ("chosen", "rejected"):
        for prompt, answer, got in zip(texts["prompt"], texts[side], done[f"ref_{side}_logps"], strict=True):
            row = encode(tokenizer, {"prompt": prompt, "completion": answer}, None)
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            both = []
            for one in (copy, model):
                with torch.no_grad():
                    logp = one(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
                both.append(logp.gather(1, ids[0, 1:, None])[labels[1:] != -100].sum().item())
            assert abs(got - both[0]) <= 1e-3 < abs(got - both[1])
