"""Tiny models whose weights several processes hold together, and what a loop of one's own makes of them."""

import torch
import transformers
from torch import nn

import lofit_fast as lf
from tests.tiny_families import tiny_config
from tests.tiny_models import tiny_model, tokens


@torch.no_grad()
def with_biases(model: nn.Module, seed: int = 3) -> nn.Module:
    """The model with biases that are not zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def parallel(folder, kind: type, n: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of that class as transformers loads it over n processes."""
    from transformers.distributed import DistributedConfig

    spread = DistributedConfig(tp_plan="auto", tp_size=n)
    return kind.from_pretrained(folder, distributed_config=spread, dtype=dtype).eval()


def row_wise(model: nn.Module, n: int, mesh=None, **layouts) -> nn.Module:
    """The model with attention and MLP cut by torch's own styles. layouts: of the output projection's."""
    from torch.distributed import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (n,)) if mesh is None else mesh
    for layer in model.model.layers:
        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        projection = "self_attn.o_proj.inner" if hasattr(layer.self_attn.o_proj, "inner") else "self_attn.o_proj"
        plan |= {projection: RowwiseParallel(**layouts)}
        plan |= {"mlp.up_proj": ColwiseParallel(), "mlp.gate_proj": ColwiseParallel()}
        parallelize_module(layer, mesh, {**plan, "mlp.down_proj": RowwiseParallel()})
    return model


def trained(model: nn.Module, handle, steps: int = 2) -> dict[str, list]:
    """A loop of one's own: AdamW, an L1 term over the scales, clipping over all vectors."""
    model.train()
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
    seen: dict[str, list] = {"loss": [], "norm": [], "first": []}
    for step in range(steps):
        ids = tokens(seed=step)
        loss = model(ids, labels=ids).loss
        scales = [vectors for (component, _), vectors in handle.vectors().items() if component == "scale"]
        (loss + 1e-3 * sum(vectors.abs().sum() for vectors in scales)).backward()
        if not step:
            seen["first"] = [vectors.grad.clone() for vectors in handle.parameters()]
        seen["norm"].append(nn.utils.clip_grad_norm_(list(handle.parameters()), 0.5).item())
        seen["loss"].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    seen["final"] = [vectors.detach().clone() for vectors in handle.parameters()]
    model.eval()
    return seen


def everything(model: nn.Module, config: lf.LofitConfig) -> dict[str, object]:
    """What patching, training and using a model give, as plain data to compare."""
    handle = lf.patch(model, config)
    seen: dict[str, object] = {"drawn": [vectors.detach().clone() for vectors in handle.parameters()]}
    seen |= trained(model, handle)
    ids = tokens()
    with torch.no_grad():
        seen["logits"] = model(ids).logits
        with handle.folded():
            seen["folded"] = model(ids).logits
        with handle.disabled():
            seen["disabled"] = model(ids).logits
    seen["generated"] = model.generate(ids[:, :4], max_new_tokens=2, do_sample=False)
    if config.scale is not None:
        scores = lf.head_scores(handle)
        seen["scores"], seen["heads"] = scores[scores.isfinite()], lf.select_heads(scores, top=2)
    return seen


def farthest(got: dict, expected: dict) -> float:
    """The largest difference between two of `everything`; what is counted or chosen must be equal."""
    assert got.keys() == expected.keys()
    assert got.get("heads") == expected.get("heads")
    assert torch.equal(got["generated"], expected["generated"])
    # one seed draws the same numbers for a head, whoever has it
    assert all(torch.equal(a, b) for a, b in zip(got["drawn"], expected["drawn"], strict=True))
    largest = 0.0
    for name in got.keys() - {"heads", "generated", "drawn"}:
        pair = (v if isinstance(v, list) else [v] for v in (got[name], expected[name]))
        for a, b in zip(*pair, strict=True):
            largest = max(largest, (torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item())
    return largest


def saved(folder, family: str, **changes) -> type:
    """Write a tiny model with biases that matter into a folder; its class."""
    model = with_biases(tiny_model(family, **changes))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return type(model)


def written(folder, name: str, **changes) -> type:
    """The same, of any family, by its config's `model_type`."""
    config = tiny_config(name, **changes)
    torch.manual_seed(0)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    transformers.utils.logging.disable_progress_bar()
    with_biases(kind(config)).save_pretrained(folder)
    return kind
