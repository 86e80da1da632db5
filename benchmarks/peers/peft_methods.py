"""PEFT's methods, as `get_peft_model` sets them up."""

from collections.abc import Callable

from torch import nn

from benchmarks.peers.hook import Vectors
from benchmarks.peers.provider import Absent, Attached

# name -> config class of peft, its options; target_modules spelt out where PEFT's defaults differ between models
METHODS: dict[str, tuple[str, dict]] = {
    "lora_qv": ("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "lora_all": ("LoraConfig", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "ia3": (
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "beft": ("BeftConfig", {"target_modules": ["v_proj"]}),
}


def attach(method: str) -> Callable[[nn.Module, Vectors], Attached]:
    """What attaches a row of METHODS; the vectors are LoFiT's and play no part."""

    def attach_peft(model: nn.Module, vectors: Vectors) -> Attached:
        config, options = METHODS[method]
        try:
            import peft

            adapted = peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **options))
        except (ImportError, AttributeError) as error:
            raise Absent(f"PEFT's {config} is not installed here: {error}") from error
        return Attached(adapted, [p for p in adapted.parameters() if p.requires_grad])

    return attach_peft
