"""Training: the two steps, on transformers.Trainer."""

from lofit_fast.data.collate import CompletionCollator
from lofit_fast.training.engine import Engine, prepared
from lofit_fast.training.trainer import LofitTrainer

__all__ = ["CompletionCollator", "Engine", "LofitTrainer", "prepared"]
