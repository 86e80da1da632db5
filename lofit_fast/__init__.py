"""lofit-fast: LoFiT, localized fine-tuning of attention heads, fast and whole (arXiv:2406.01563)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lofit_fast.config import LofitConfig, Recipe
from lofit_fast.heads import select_heads
from lofit_fast.patching.export_targets import export
from lofit_fast.patching.handle import LofitHandle
from lofit_fast.patching.head_norms import head_scores
from lofit_fast.patching.patch import load, patch
from lofit_fast.patching.patched import handle_of
from lofit_fast.patching.verify import verify_export

if TYPE_CHECKING:
    from lofit_fast.evaluation.judge import judge
    from lofit_fast.evaluation.logprobs import reference_logprobs
    from lofit_fast.models.load import load_model
    from lofit_fast.training.adapter_checkpoints import AdapterCheckpoints
    from lofit_fast.training.engine import Engine
    from lofit_fast.training.fit import fit, fit_preferences

__version__ = "0.1.0"
__all__ = [
    "AdapterCheckpoints",
    "Engine",
    "LofitConfig",
    "LofitHandle",
    "Recipe",
    "export",
    "fit",
    "fit_preferences",
    "handle_of",
    "head_scores",
    "judge",
    "load",
    "load_model",
    "patch",
    "reference_logprobs",
    "select_heads",
    "verify_export",
]


# these pull in transformers: loaded when asked for, so that importing the package stays light
_LATER = {
    "AdapterCheckpoints": "lofit_fast.training.adapter_checkpoints",
    "Engine": "lofit_fast.training.engine",
    "fit": "lofit_fast.training.fit",
    "fit_preferences": "lofit_fast.training.fit",
    "judge": "lofit_fast.evaluation.judge",
    "load_model": "lofit_fast.models.load",
    "reference_logprobs": "lofit_fast.evaluation.logprobs",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
