"""Models spread over devices that differ: whatever a layer computes with is where the layer is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lofit_fast as lf
from tests.fake_devices import move, registered, without_numbers
from tests.several_processes import in_processes
from tests.tiny_models import LAYERS, tiny_model, tokens

pytest.importorskip("accelerate")

SOME = {"scale": [(0, 0), (1, 1), (2, 2)], "offset": [(0, 1), (1, 0), (1, 3), (2, 0)]}
BOTH, ANSWERS = lf.LofitConfig(**SOME), lf.LofitConfig(**SOME, positions="answer")
ALL = lf.LofitConfig(scale="all")


def spread(model, first, others):
    """Its first layer on one device, where inputs go too, and the others on another."""
    from accelerate import dispatch_model

    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), first)
    places |= dict.fromkeys(("model.norm", "lm_head", *(f"model.layers.{n}" for n in range(1, LAYERS))), others)
    return dispatch_model(model, places, main_device=first, force_hooks=True)


def check_places(handle):
    """Vectors and head indices are beside the weight; of an offloaded one, where it is computed with."""
    for layer in handle.layers.values():
        weight = layer.inner.weight
        beside = torch.device(layer.inner._hf_hook.execution_device) if weight.is_meta else weight.device
        for component in ("scale", "offset"):
            if layer.heads(component):
                assert getattr(layer, component).device == getattr(layer, f"{component}_heads").device == beside


def used(model, handle, where="cpu", backward=True):
    """Training and evaluation by hand; the learning rate of a step needs numbers, and none of it is computed."""
    ids = tokens().to(where)
    labels = ids.clone()
    labels[:, :4] = -100
    loss = model(input_ids=ids, labels=labels).loss
    if backward:
        loss.backward()
        for vectors in handle.parameters():
            assert vectors.grad.device == vectors.device
        nn.utils.clip_grad_norm_(list(handle.parameters()), 1.0)
        torch.optim.SGD(handle.parameters(), lr=0.1).step()
    if backward and handle.config.positions == "all":
        with handle.folded():
            model(input_ids=ids)
        lf.head_scores(handle)
    if backward:
        with torch.no_grad(), handle.disabled():
            model(input_ids=ids)


def patched_after(config, *places, **options):
    model = spread(tiny_model("llama"), *places)
    handle = lf.patch(model, config)
    check_places(handle)
    used(model, handle, places[0], **options)
    return model, handle


def patched_before(config, *places, **options):
    model = tiny_model("llama")
    handle = lf.patch(model, config)
    model = spread(model, *places)
    check_places(handle)
    used(model, handle, places[0], **options)
    return model, handle


def gathered(*places):
    """Spread, patched, and then without hooks on one device again."""
    from accelerate.hooks import remove_hook_from_submodules

    model, handle = patched_after(BOTH, *places)
    remove_hook_from_submodules(model)
    move(model, places[1])
    check_places(handle)
    used(model, handle, places[1])
    handle.unpatch()
    model(tokens().to(places[1]))


def mixes_are_noticed(*places):
    model, handle = patched_after(BOTH, *places)
    layer = handle.layers[2]
    layer.offset = nn.Parameter(layer.offset.detach().to(places[0]))
    with pytest.raises(Exception, match=r"cpu|fake:0"):
        model(tokens().to(places[0]))


def test_a_forward_on_two_devices():
    def work(rank):
        registered()
        with without_numbers():
            patched_after(BOTH, "fake:0", "fake:1", backward=False)

    in_processes(1, work)


def everything():
    registered()
    with without_numbers():
        for config in (BOTH, ANSWERS, ALL):
            patched_after(config, "cpu", "fake:0")
            patched_before(config, "cpu", "fake:0")
        # what is on the CPU is offloaded then, and computed on the other device
        patched_after(BOTH, "fake:0", "cpu")
        gathered("cpu", "fake:0")
        mixes_are_noticed("cpu", "fake:0")


@pytest.mark.slow
def test_training_on_two_devices():
    where = Path(__file__).parents[2]
    paths = os.pathsep.join([str(where / "kernels"), str(where)])
    code = "from tests.patching.test_two_devices import everything; everything(); print('all of it')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, cwd=where
    )
    assert done.returncode == 0 and "all of it" in done.stdout, done.stderr[-3000:]
