"""Every number of `plan --devices` against a count: of the model itself, of saved tensors, of what processes send."""

import warnings

import pytest
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.models import device_arithmetic as arithmetic
from lofit_fast.models import meta_counts
from lofit_fast.models.device_arithmetic import MODES, plan_devices
from lofit_fast.models.meta_counts import Decoder, meta_model, saved_for_backward, shard_of, weights_of
from lofit_fast.models.tensor_cuts import cut, planned, sent_per_token
from tests.counted_collectives import CollectiveBytes
from tests.several_processes import in_processes
from tests.tiny_families import family_config
from tests.tiny_models import HEADS, HIDDEN, LAYERS, VOCAB, tiny_model, tokens

B, T = tokens().shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny Llama's config and no weights."""
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").config.save_pretrained(path)
    return str(path)


def decoder_of(name, dtype=torch.float32):
    return Decoder.of(meta_model(str(name), dtype))


def saved_from(decoder, layer, length=T, scaled=False):
    return saved_for_backward(decoder, length, decoder.lowest(one_at(layer)), scaled)


def one_at(layer):
    return [int(index == layer) for index in range(LAYERS)]


def held_by(model):
    return sum(tensor.numel() * tensor.itemsize for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # as their pages on the hub say
    [
        ("Llama-3.2-1B", 1235814400),
        pytest.param("Llama-3-8B", 8030261248, marks=pytest.mark.slow),
        pytest.param("Llama-3-70B", 70553706496, marks=pytest.mark.slow),
    ],
)
def test_published_models_have_the_parameters_that_are_published(name, parameters):
    weights = weights_of(decoder_of(name, torch.bfloat16))
    assert weights.total - weights.buffers == 2 * parameters


def test_weights_are_those_of_the_model(family, tmp_path):
    model = tiny_model(family)
    model.config.save_pretrained(tmp_path)
    weights = weights_of(decoder_of(tmp_path))
    assert weights.total == held_by(model)
    assert len(weights.layers) == LAYERS


def test_a_token_keeps_for_backward_what_it_does_in_a_patched_model(family, tmp_path):
    with meta_counts._counted_attention():
        model = tiny_model(family, attn_implementation=meta_counts._ATTENTION)
    model.config.save_pretrained(tmp_path)
    without_numbers = decoder_of(tmp_path)
    for layer in (0, LAYERS - 1):
        short, long = (saved_from(without_numbers, layer, length) for length in (T, 2 * T))
        assert long.total - short.total == kept_by(model, layer, 2 * T) - kept_by(model, layer, T)
        assert long.layers[:layer] == (0,) * layer
        assert all(long.layers[layer:])


def kept_by(model, layer, length):
    """Bytes that the forward of a model, patched in one layer, keeps beside its weights."""
    handle = lf.patch(model, lf.LofitConfig(offset=[(layer, 1)]))
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with meta_counts._counted_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=tokens(batch=1, length=length), use_cache=False)
    handle.unpatch()
    return sum(storage.nbytes() for storage in found.values())


def test_scales_keep_their_z_too(folder):
    decoder = decoder_of(folder)
    offset, scale = (saved_from(decoder, 1, scaled=scaled) for scaled in (False, True))
    assert scale.total - offset.total == T * decoder.projections[1].in_features * 4


def test_attention_keeps_what_flash_attention_does(folder):
    decoder = decoder_of(folder, torch.bfloat16)
    attention = decoder.layers[0].self_attn
    above, lowest = (saved_from(decoder, layer).layers[2] for layer in (0, 2))
    queries, keys = attention.q_proj.out_features, attention.k_proj.out_features
    # and the float32 input of a norm with its scale, for each token
    assert above - lowest == T * (2 * (2 * queries + 2 * keys) + 4 * HEADS + 4 * HIDDEN + 4)


def test_logits():
    hidden, head = torch.randn(T, HIDDEN, dtype=torch.bfloat16, requires_grad=True), nn.Linear(HIDDEN, VOCAB).bfloat16()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = head(hidden)
        nn.functional.cross_entropy(logits.float(), torch.zeros(T, dtype=torch.long))
    (kept,) = (tensor for tensor in kept.values() if tensor.shape == (T, VOCAB))
    assert arithmetic.logit_bytes(T, VOCAB, 2) == logits.nbytes + kept.nbytes


def test_vectors():
    handle = lf.patch(tiny_model("llama"), lf.LofitConfig(scale="all"))
    parameters = list(handle.parameters())
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = [*parameters, *(parameter.grad for parameter in parameters), *moments]
    assert arithmetic.vector_bytes(sum(p.numel() for p in parameters)) == sum(tensor.nbytes for tensor in held)


def test_data_parallel_sums_the_vectors_alone():
    def work(rank):
        handle = lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(0, 1), (2, 0), (2, 3)]))
        model, sent = nn.parallel.DistributedDataParallel(handle.model), []

        def count(_, bucket):
            sent.append(bucket.buffer().nbytes)
            return (
                torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0])
            )

        model.register_comm_hook(None, count)
        ids = tokens(seed=rank)
        model(input_ids=ids, labels=ids).loss.backward()
        return sum(sent), sum(p.numel() for p in handle.parameters())

    for sent, numbers in in_processes(2, work):
        assert sent == arithmetic.gradient_payload(numbers)


def with_vector(model, layer):
    """The model frozen, with one vector added in a layer."""
    model.requires_grad_(False)
    vector = nn.Parameter(torch.zeros(HIDDEN))
    model.model.layers[layer].self_attn.o_proj.register_forward_hook(lambda _, args, out: out + vector)
    return model


def counted_step(model):
    ids = tokens()
    with warnings.catch_warnings(), CollectiveBytes() as counted:
        warnings.simplefilter("ignore")
        out = model(input_ids=ids, labels=ids, use_cache=False)
        forward = dict(counted.bytes)
        out.loss.backward()
    return forward, dict(counted.bytes)


def sharded(model):
    """As `fit` shards a model where accelerate asks for FSDP2."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model


@pytest.mark.parametrize(("n", "tied"), [(2, False), pytest.param(3, True, marks=pytest.mark.slow)])
def test_fsdp_gathers_what_the_formula_says(n, tied, tmp_path):
    tiny_model("llama", tie_word_embeddings=tied).config.save_pretrained(tmp_path)

    def work(rank):
        found = []
        for layer in range(LAYERS):
            model = sharded(with_vector(tiny_model("llama", tie_word_embeddings=tied), layer))
            # padding counts: storage, not numbers
            here = sum({id(p): p._local_tensor.untyped_storage().nbytes() for p in model.parameters()}.values())
            found.append((here, *counted_step(model)))
        return found

    shards = shard_of(decoder_of(tmp_path), n)
    for found in in_processes(n, work):
        for layer, (here, forward, both) in enumerate(found):
            expected = arithmetic.fsdp_payload(shards, layer, n)
            assert [*forward.values()] == [expected[0]]
            assert [*both.values()] == [sum(expected)]
            assert here == shards.total - shards.buffers


@pytest.mark.parametrize(
    "tied", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.slow)]
)
def test_tensor_parallelism_sends_what_the_formula_says(tied, tmp_path):
    pytest.importorskip("transformers.distributed.tensor_parallel", reason="this transformers cuts models otherwise")
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path)
    itemsize, n = 4, 2

    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from transformers import AutoModelForCausalLM

        found, mesh = [], init_device_mesh("cpu", (n,))
        for layer in range(LAYERS):
            model = AutoModelForCausalLM.from_pretrained(tmp_path, tp_plan="auto", device_mesh=mesh)
            here = sum({id(p): getattr(p, "_local_tensor", p).nbytes for p in model.parameters()}.values())
            found.append((here, *counted_step(with_vector(model, layer))))
        return found

    whole, mine = decoder_of(tmp_path), decoder_of(tmp_path)
    cut(mine.model, n)
    summed, gathered = "_c10d_functional::all_reduce", "_c10d_functional::all_gather_into_tensor"
    for rank, found in enumerate(in_processes(n, work)):
        for layer, (here, forward, both) in enumerate(found):
            per_token = sent_per_token(whole, whole.lowest(one_at(layer)), n)
            size = B * T * itemsize
            assert forward[summed] == per_token.forward * size
            assert both[summed] - forward[summed] == per_token.backward * size
            assert both[gathered] == per_token.gathered * size
            # the first process has the longer parts
            assert rank > 0 or here == weights_of(mine).total - weights_of(mine).buffers


def test_layers_are_dealt_by_bytes():
    weights = meta_counts.Weights((10,) * 8, 12, 0)
    assert arithmetic.stages_of(weights, 6, 2) == [range(0, 4), range(4, 8)]
    assert [len(stage) for stage in arithmetic.stages_of(weights, 0, 3)] == [1, 3, 4]
    assert arithmetic.stages_of(weights, 0, 1) == [range(8)]


@pytest.mark.parametrize(
    ("layers", "outside", "head", "n", "borders"),
    [
        ((10,) * 8, 12, 6, 2, [4]),
        # an output head that is the embedding is where that is
        ((10,) * 8, 6, 0, 2, [3, 8]),
        ((1, 1), 100, 0, 2, [0, 2]),
        # a head alone on its device, and devices that have nothing
        ((1, 1), 100, 100, 2, [2]),
        ((1, 1), 4, 2, 8, [0, 1, 2]),
        ((1, 1), 4, 2, 1, []),
    ],
)
def test_hidden_states_go_where_the_next_weights_are(layers, outside, head, n, borders):
    weights = meta_counts.Weights(layers, outside, 0)
    assert arithmetic.borders_of(weights, head, arithmetic.stages_of(weights, head, n)) == borders


def test_an_attention_of_a_family_s_own_is_no_reason_to_refuse_it(tmp_path):
    family_config("falcon").save_pretrained(tmp_path)
    layers = len(Decoder.of(meta_model(str(tmp_path), torch.float32)).projections)
    plan = plan_devices(str(tmp_path), "ddp", 2, T, torch.float32, [1] * layers, [0] * layers)
    # transformers 5.24 has a forward that asks for numbers, which a plan has none of
    said = ("attention is counted as", "activations are not counted: the forward of a Falcon")
    assert plan.total > 0 and any(words in plan.notes[0] for words in said)


def test_a_plan_that_cuts_other_parameters_is_not_counted():
    model = tiny_model("llama")
    model.tp_plan = {**model.tp_plan, "model.norm.weight": "colwise"}
    with pytest.raises(ValueError, match="treats model.norm.weight as 'colwise': it is not counted here"):
        planned(model)


@pytest.mark.parametrize("mode", MODES)
def test_one_device_sends_nothing(mode, folder):
    plan = plan_devices(folder, mode, 1, T, torch.float32, [0] * LAYERS, [0, 1, 2])
    assert plan.sent == 0
    alone = plan_devices(folder, "ddp", 1, T, torch.float32, [0] * LAYERS, [0, 1, 2])
    assert plan.total == alone.total
    assert {item.evidence for item in plan.memory} == {arithmetic.COUNT, arithmetic.FORMULA}


def test_more_devices_keep_less_of_what_is_divided(folder):
    plans = {mode: plan_devices(folder, mode, 2, T, torch.float32, [HEADS] * LAYERS, [0] * LAYERS) for mode in MODES}
    alone = plan_devices(folder, "ddp", 1, T, torch.float32, [HEADS] * LAYERS, [0] * LAYERS)
    assert plans["ddp"].total == alone.total
    for mode in ("fsdp", "tp", "device-map"):
        assert plans[mode].memory[0].bytes < 0.7 * alone.memory[0].bytes
    numbers = LAYERS * HEADS * 16
    assert plans["ddp"].sent == plans["ddp"].payload[0].bytes == 4 * numbers


def test_quantized_weights_are_said_to_be_counted_whole(tmp_path):
    config = tiny_model("llama").config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    plan = plan_devices(str(tmp_path), "ddp", 2, T, torch.float32, [0] * LAYERS, [0, 1, 2])
    assert plan.notes == ("The weights are quantized (gptq), and counted as if they were torch.float32.",)


@pytest.mark.slow
def test_a_cut_model_of_real_sizes_keeps_a_part():
    wide = plan_devices("Llama-3.2-1B", "tp", 8, T, torch.bfloat16, [32] * 16, [0] * 16)
    weights = plan_devices("Llama-3.2-1B", "ddp", 8, T, torch.bfloat16, [32] * 16, [0] * 16).memory[0].bytes
    assert wide.memory[0].bytes == pytest.approx(weights / 8, rel=0.01)
    assert wide.memory[2].what == "activations kept for backward"


def test_what_cannot_be_planned(folder):
    nothing = [0] * LAYERS
    for mode, devices, message in (
        ("zero", 2, "unknown mode 'zero': expected one of ddp, fsdp, tp, device-map"),
        ("ddp", 0, "at least one device, got 0"),
        ("tp", 3, "3 devices do not divide 4 heads"),
        ("tp", 4, "4 devices do not divide 2 heads"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_devices(folder, mode, devices, T, torch.float32, nothing, one_at(1))
    with pytest.raises(ValueError, match="of Gemma-7B only the projections are known"):
        plan_devices("Gemma-7B", "ddp", 1, T, torch.float32, [1] * 28, [0] * 28)
