"""What an engine may change of a patched model, and what it must leave or put back."""

import torch

import lofit_fast as lf
from tests.tiny_models import tokens


def belongings(model):
    """The objects a model is made of, down to its modules' own attributes."""
    configs = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    return [{key: id(value) for key, value in vars(m).items()} for m in model.modules()], configs


def gradients(model, length=9):
    ids = tokens(2, length)
    handle = lf.handle_of(model)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss.item(), torch.autograd.grad(loss, list(handle.parameters()))
