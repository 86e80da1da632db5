"""FSDP2: a model sharded before or after the patch trains, chooses, saves and exports as one process does."""

import pytest
import torch
from torch import distributed, nn

import lofit_fast as lf
from lofit_fast.patching.fully_sharded import is_spread, spread_sample
from lofit_fast.patching.storage import read_adapter
from lofit_fast.patching.weight_sample import base_digest, sample_places
from tests.oracle import randomize
from tests.patched_models import CONFIGS, relative
from tests.several_processes import in_processes
from tests.tiny_families import tiny_family
from tests.tiny_models import tiny_model, tokens

fsdp = pytest.importorskip("torch.distributed.fsdp", reason="torch without torch.distributed")
# divided by 2, 3 and 4
BATCH = 12


def gpt2():
    return tiny_family("gpt2")


def odd():
    """Numbers that no number of processes divides, and one tensor for the embeddings and the head."""
    sizes = {"hidden_size": 35, "num_attention_heads": 5, "num_key_value_heads": 5}
    return tiny_model("llama", **sizes, tie_word_embeddings=True)


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "gemma": lambda: tiny_model("gemma"),
    "qwen2": lambda: tiny_model("qwen2"),
    "gpt2": gpt2,
    "odd": odd,
}


def layers_of(model):
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def sharded(model, per_layer=True, **how):
    if per_layer:
        for layer in layers_of(model):
            fsdp.fully_shard(layer, **how)
    return fsdp.fully_shard(model, **how)


def loss(model, rank=0, n=1, examples=slice(None)):
    """Of this process's part of a batch: as many examples in each."""
    ids = tokens(BATCH, 11, 5)[rank * BATCH // n : (rank + 1) * BATCH // n][examples]
    return nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def trained(model, handle, rank=0, n=1, steps=2):
    """Losses over all processes, with clipped gradients."""
    optimizer = torch.optim.AdamW(list(handle.parameters()), lr=1e-2)
    losses = []
    for _ in range(steps):
        value = loss(model, rank, n)
        value.backward()
        nn.utils.clip_grad_norm_(list(handle.parameters()), 0.02)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())
        if n > 1:
            distributed.all_reduce(losses[-1])
    return [float(value) / n for value in losses]


def two_steps(model, shard=None, rank=0, n=1):
    """Losses of step 1, heads, losses of step 2, vectors. shard: (when, do), in step 1."""
    when, do = shard or ("never", None)
    if when == "before":
        do(model)
    handle = lf.patch(model, lf.LofitConfig(scale="all", init_std=0.1))
    if when == "after":
        do(model)
    first = trained(model, handle, rank, n)
    heads = lf.select_heads(lf.head_scores(handle), top=3)
    handle.unpatch()
    handle = lf.patch(model, lf.LofitConfig(offset=heads, init_std=0.1))
    second = trained(model, handle, rank, n)
    return first, heads, second, handle.whole_vectors()


def check_same_steps(got, expected):
    (first, heads, second, vectors), (want_first, want_heads, want_second, want_vectors) = got, expected
    assert heads == want_heads
    assert first == pytest.approx(want_first, rel=1e-5) and second == pytest.approx(want_second, rel=1e-5)
    assert vectors.keys() == want_vectors.keys()
    for key, want in want_vectors.items():
        assert relative(vectors[key], want) < 1e-5


def check_two_steps(name, n, ways):
    """ways: (when, options of `sharded`) each."""
    expected = two_steps(MODELS[name]())

    def work(rank):
        for when, how in ways:
            got = two_steps(MODELS[name](), (when, lambda model, how=how: sharded(model, **how)), rank, n)
            check_same_steps(got, expected)

    in_processes(n, work, limit=250)


@pytest.mark.parametrize(("name", "n"), [("llama", 2), pytest.param("odd", 3, marks=pytest.mark.slow)])
def test_two_steps_are_those_of_one_process(name, n):
    check_two_steps(name, n, [("before", {}), ("after", {})])


WAYS = [
    (when, {"per_layer": per_layer, "reshard_after_forward": reshard})
    for when in ("before", "after")
    for per_layer in (True, False)
    for reshard in (True, False)
]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_two_steps_however_they_are_sharded(name, n):
    ways = [*WAYS]
    ways += [(when, {"offload_policy": fsdp.CPUOffloadPolicy(pin_memory=False)}) for when in ("before", "after")]
    check_two_steps(name, n, ways)


def patched(name="llama", config="both"):
    """(model, handle) with vectors that matter, in one process."""
    model = MODELS[name]()
    handle = lf.patch(model, CONFIGS[config])
    randomize(handle)
    return model, handle


def in_each_order(name, folder, rank=0, **how):
    """(model, handle) with the vectors of a folder: sharded after patching, then before."""
    model = MODELS[name]()
    handle = lf.load(model, folder, strict=True)
    yield sharded(model, **how), handle
    model = sharded(MODELS[name](), **how)
    yield model, lf.load(model, folder, strict=True)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_whole_in_every_process(tmp_path, monkeypatch):
    """What is saved, scored, told of the base and computed, in both orders; and nothing of it changes the model."""
    model, handle = patched()
    handle.save(tmp_path / "one")
    digest = base_digest(model)
    scores, vectors = lf.head_scores(handle), {key: v.detach() for key, v in handle.vectors().items()}
    with torch.no_grad():
        expected = model(tokens()).logits
        with handle.disabled():
            base = model(tokens()).logits

    monkeypatch.setattr("lofit_fast.patching.handle.push_adapter", lambda adapter, name: f"by {distributed.get_rank()}")

    def work(rank):
        for order, (model, handle) in enumerate(in_each_order("llama", tmp_path / "one")):
            assert torch.equal(lf.head_scores(handle), scores)
            assert handle.push_to_hub("me/it") == ("by 0" if handle.in_parts or rank == 0 else "me/it")
            assert base_digest(model) == digest
            # after a forward FSDP leaves what it has gathered for the root
            for scope, want in ((handle.folded, expected), (handle.disabled, base)):
                with torch.no_grad(), scope():
                    assert relative(model(tokens()).logits, want) < 1e-6
            for key, want in vectors.items():
                assert torch.equal(handle.whole_vectors()[key], want)
            assert handle.save(tmp_path / f"{order}") == tmp_path / f"{order}"
            with torch.no_grad():
                for vector in handle.parameters():
                    vector.zero_()
            handle.take(read_adapter(tmp_path / "one"))
            assert relative(model(tokens()).logits, expected) < 1e-6
            handle.unpatch()
            handle.model.requires_grad_(False)
            assert relative(model(tokens()).logits, base) < 1e-6
            assert isinstance(model, fsdp.FSDPModule)
        return None

    in_processes(2, work)
    for order in ("0", "1"):
        assert files(tmp_path / order) == files(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["odd"])
def test_export_is_that_of_one_process(name, tmp_path):
    _, handle = patched(name)
    handle.save(tmp_path / "adapter")
    lf.export(handle, tmp_path / "one")

    def work(rank):
        for order, (_, handle) in enumerate(in_each_order(name, tmp_path / "adapter")):
            assert lf.export(handle, tmp_path / f"{order}") == tmp_path / f"{order}"
            report = lf.verify_export(handle, tmp_path / f"{order}")
            with pytest.raises(ValueError, match="cannot merge a sharded model: .*lofit_fast.export"):
                handle.merge()
            handle.check_live()
        return report.difference

    assert max(in_processes(3, work)) < 1e-5
    for order in ("0", "1"):
        assert files(tmp_path / order) == files(tmp_path / "one")


def mean_gradients(model, handle, rank, n, passes):
    """Gradients after several backward passes, as of gradients that are accumulated."""
    for part in range(passes):
        loss(model, rank, n, slice(part, None, passes)).backward()
    return [v.grad.full_tensor() if hasattr(v.grad, "full_tensor") else v.grad for v in handle.parameters()]


def ignoring(model, handle):
    """Sharded after the patch, but for the vectors and one whole layer."""
    own = set(handle.parameters())
    for layer in list(layers_of(model))[1:]:
        fsdp.fully_shard(layer, ignored_params=own)


def count_sums(monkeypatch):
    """How many numbers each sum over the processes takes, from now on."""
    sent, sums = [], distributed.all_reduce

    def counted(tensor, *args, **options):
        sent.append(tensor.numel())
        return sums(tensor, *args, **options)

    monkeypatch.setattr(distributed, "all_reduce", counted)
    return sent


def failed_pass(model, handle, rank, n):
    """A backward pass that an error ends, after the first of the gradients has come."""

    def fail(gradient):
        raise RuntimeError("planted")

    planted = list(handle.parameters())[0].register_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        loss(model, rank, n).backward()
    planted.remove()
    for vector in handle.parameters():
        vector.grad = None


def test_gradients_are_means(tmp_path, monkeypatch):
    """Of vectors that FSDP was told to ignore and of a layer that nobody sharded; three passes before a step."""
    model, handle = patched()
    handle.save(tmp_path / "one")
    expected = mean_gradients(model, handle, 0, 1, 1)

    def work(rank):
        model = MODELS["llama"]()
        handle = lf.load(model, tmp_path / "one")
        ignoring(model, handle)
        assert not handle.in_parts
        failed_pass(model, handle, rank, 2)
        sent = count_sums(monkeypatch)
        got = mean_gradients(model, handle, rank, 2, 3)
        # of three passes, each the mean over a third of the examples
        assert all(relative(g / 3, e) < 1e-5 for g, e in zip(got, expected, strict=True))
        # all vectors in one message of each pass, with a number for each that says whether it has a gradient
        assert sent == [handle.n_parameters() + len(got)] * 3

    in_processes(2, work)


def test_processes_patch_alike():
    def work(rank):
        model = sharded(MODELS["llama"]())
        before = {name: id(p) for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match="expected the same LofitConfig in every process"):
            lf.patch(model, lf.LofitConfig(offset=[(0, rank)]))
        assert {name: id(p) for name, p in model.named_parameters()} == before and lf.handle_of(model) is None

    in_processes(2, work)


def test_samples_of_parts_are_those_of_the_whole():
    """Of matrices whose rows are not divided evenly, of experts' blocks, and of one number a row, -0.0 too."""

    def work(rank):
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor
        from torch.distributed.tensor.placement_types import _StridedShard

        mesh = distributed.init_device_mesh("cpu", (3,))
        torch.manual_seed(0)
        for shape, dtype in (((700, 301), torch.bfloat16), ((7, 130, 90), torch.float32), ((2, 70000), torch.float64)):
            tensor = torch.randn(shape).to(dtype)
            tensor.flatten()[::3] *= -0.0
            for placement in (Shard(0), Replicate()):
                part = distribute_tensor(tensor, mesh, [placement])
                got, want = spread_sample(part, sample_places), tensor.reshape(-1, shape[-1])[sample_places(tensor)]
                bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
                assert torch.equal(got.view(bits), want.view(bits))

        # experts, of which each process has some inner rows, or some of both halves of these
        experts = torch.randn(4, 96, 200, generator=torch.Generator().manual_seed(2))
        for placement in (Shard(1), _StridedShard(1, split_factor=2)):
            part = distribute_tensor(experts, mesh, [placement], src_data_rank=None)
            assert is_spread(part) and part.to_local().shape == (4, 32, 200)
            assert torch.equal(spread_sample(part, sample_places), experts.view(-1, 200)[sample_places(experts)])

    in_processes(3, work)


@pytest.mark.slow
def test_two_steps_on_a_mesh_of_two_dimensions():
    """Parts within a pair of processes, copies between the pairs."""
    expected = two_steps(MODELS["qwen2"]())

    def loss_of_four(rank):
        mesh = distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
        for when in ("before", "after"):
            check_same_steps(
                two_steps(MODELS["qwen2"](), (when, lambda model: sharded(model, mesh=mesh)), rank, 4), expected
            )

    in_processes(4, loss_of_four, limit=200)


@pytest.mark.slow
def test_models_in_two_processes(tmp_path):
    """Of the first FSDP: what is refused while the vectors are in parts, and what gathering them gives."""
    handle = lf.patch(tiny_model("llama"), CONFIGS["both"])
    handle.save(tmp_path / "alone")

    def work(rank):
        model = tiny_model("llama")
        handle = lf.patch(model, CONFIGS["both"])
        wrapper = fsdp.FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="cannot save the adapter of a sharded model"):
            handle.adapter()
        with pytest.raises(ValueError, match="cannot merge a sharded model"):
            handle.merge()
        with fsdp.FullyShardedDataParallel.summon_full_params(wrapper):
            handle.save(tmp_path / f"{rank}")

    in_processes(2, work)
    for rank in ("0", "1"):
        gathered = tmp_path / rank / "adapter_model.safetensors"
        assert gathered.read_bytes() == (tmp_path / "alone" / "adapter_model.safetensors").read_bytes()


def test_vectors_that_data_parallelism_has_not_seen_are_refused():
    """Its processes would train adapters of their own."""

    def work(rank):
        model, ids = tiny_model("llama"), tokens(2, 5, seed=rank)
        wrapped = nn.parallel.DistributedDataParallel(model)
        handle = lf.patch(wrapped.module, lf.LofitConfig(offset=[(0, 1)]))
        with pytest.raises(ValueError, match="does not know 1 of the 1 vectors, which are newer than it"):
            wrapped(ids, labels=ids)
        with torch.no_grad():
            wrapped(ids)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            wrapped(ids, labels=ids).loss.backward()
        return [vectors.grad for vectors in handle.parameters()]

    one, other = in_processes(2, work)
    assert all(map(torch.equal, one, other))
