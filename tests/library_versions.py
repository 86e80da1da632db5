"""What the installed releases of other libraries can do. A test of what they cannot is skipped, and says why."""

import inspect
from contextlib import ExitStack
from importlib.util import find_spec

import pytest
import torch
import transformers
from torch import nn
from transformers import masking_utils

from lofit_fast.data.collate import stock_logits
from lofit_fast.models.row_index import selecting_rows

# what a run leaves beside its numbers
PICTURES = find_spec("matplotlib") is not None
# how a test's batch names the rows whose logits it wants: where models take no mask, by our own index
BY_ROW = "rows" if stock_logits() == "rows" else "index"
takes_masks = pytest.mark.skipif(
    stock_logits() != "rows",
    reason=f"transformers {transformers.__version__} takes no mask as logits_to_keep, as 5.21 does",
)
eager_masks_do_not_wait = pytest.mark.skipif(
    "torch.tensor(" in inspect.getsource(masking_utils.eager_mask),
    reason=f"transformers {transformers.__version__} makes a tensor of a number for every mask of eager attention",
)
# seen with 2.11 and transformers 5.17; 2.13 compiles it
compiles_hooks = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 12),
    reason=f"torch {torch.__version__} cannot compile a whole model with hooks: its guard on them fails at once",
)


def called(model: nn.Module, batch, **options):
    """What a model makes of a batch whose rows are named BY_ROW."""
    with selecting_rows(model):
        return model(**{"use_cache": False, **batch, **options})


def taking_rows(model: nn.Module) -> nn.Module:
    """The model, which for as long as it lives takes batches whose rows are named BY_ROW."""
    if BY_ROW == "index":
        model.scope = ExitStack()
        model.scope.enter_context(selecting_rows(model))
    return model
