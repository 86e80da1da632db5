"""Tiny random models beyond decoders, each as itself and with an untrained classifier, and their inputs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.tiny_families import tiny_config
from tests.tiny_models import tokens

CLASSES = 3


@dataclass(frozen=True)
class Other:
    """One row: the config's model_type, the classes, the projections' names with N for the layer, the inputs' kind.

    head: the classifier's attribute, in which all is untrained.
    """

    model_type: str
    model: str
    classifier: str
    place: str
    place_in_classifier: str
    inputs: str = "text"
    head: str = "classifier"
    changes: dict = field(default_factory=dict)


_BERT = r"\w+\.encoder\.layer\.N\.attention\.output\.dense"
OTHERS = {
    row.model_type: row
    for row in (
        Other("bert", "BertForMaskedLM", "BertForSequenceClassification", _BERT, _BERT),
        Other("deberta", "DebertaForMaskedLM", "DebertaForSequenceClassification", _BERT, _BERT),
        Other("deberta-v2", "DebertaV2ForMaskedLM", "DebertaV2ForSequenceClassification", _BERT, _BERT),
        Other(
            "distilbert",
            "DistilBertForMaskedLM",
            "DistilBertForSequenceClassification",
            r"distilbert\.transformer\.layer\.N\.attention\.out_lin",
            r"distilbert\.transformer\.layer\.N\.attention\.out_lin",
        ),
        Other(
            "modernbert",
            "ModernBertForMaskedLM",
            "ModernBertForSequenceClassification",
            r"model\.layers\.N\.attn\.Wo",
            r"model\.layers\.N\.attn\.Wo",
            changes={"cls_token_id": 1, "sep_token_id": 2},
        ),
        Other("roberta", "RobertaForMaskedLM", "RobertaForSequenceClassification", _BERT, _BERT),
        Other(
            "t5",
            "T5ForConditionalGeneration",
            "T5ForSequenceClassification",
            r"decoder\.block\.N\.layer\.0\.SelfAttention\.o",
            r"transformer\.decoder\.block\.N\.layer\.0\.SelfAttention\.o",
            inputs="texts",
            head="classification_head",
            changes={
                "d_kv": 8,
                "d_ff": 48,
                "d_model": 32,
                "num_layers": 2,
                "num_decoder_layers": 3,
                "num_heads": 4,
                "decoder_start_token_id": 0,
            },
        ),
        Other(
            "vit",
            "ViTForMaskedImageModeling",
            "ViTForImageClassification",
            r"vit\.(encoder\.)?layers?\.N\.attention\.(output\.dense|o_proj)",
            r"vit\.(encoder\.)?layers?\.N\.attention\.(output\.dense|o_proj)",
            inputs="image",
            changes={"num_hidden_layers": 3, "num_attention_heads": 4, "encoder_stride": 14},
        ),
        Other(
            "whisper",
            "WhisperForConditionalGeneration",
            "WhisperForAudioClassification",
            r"model\.decoder\.layers\.N\.self_attn\.out_proj",
            r"encoder\.layers\.N\.self_attn\.out_proj",
            inputs="sound",
            changes={
                "num_mel_bins": 8,
                "max_source_positions": 8,
                "classifier_proj_size": 16,
                "encoder_attention_heads": 4,
            },
        ),
    )
}


def tiny_other(name: str, *, classifier: bool = False, seed: int = 0):
    """A random float32 model in eval mode: itself, or with an untrained classifier of CLASSES classes."""
    import transformers

    row = OTHERS[name]
    config = tiny_config(row.model_type, num_labels=CLASSES, **row.changes)
    torch.manual_seed(seed)
    return getattr(transformers, row.classifier if classifier else row.model)(config).eval()


def inputs_of(name: str, *, classifier: bool = False) -> dict[str, Tensor]:
    """A fixed batch of two for a model."""
    kind = OTHERS[name].inputs
    drawn = torch.Generator().manual_seed(1)
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 28, 28, generator=drawn)}
    if kind == "sound":
        sound = {"input_features": torch.randn(2, 8, 16, generator=drawn)}
        return sound if classifier else sound | {"decoder_input_ids": tokens()}
    text = {"input_ids": tokens()}
    if kind == "texts" and classifier:
        # the last token of each is what a classifier of two stacks reads
        text["input_ids"][:, -1] = 2
    return text | ({"decoder_input_ids": tokens(seed=2)} if kind == "texts" and not classifier else {})
