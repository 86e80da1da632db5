"""Where the output projection of each model family is, as data. Adding a family is adding a row and its test."""

from dataclasses import dataclass

# where a layer's attention output is projected, in the order in which a layer is asked for it. Of two attentions in a
# layer the first named here is meant: a decoder's own, not the one that looks at an encoder
PROJECTIONS = (
    "self_attn.o_proj",
    "attention.o_proj",
    "attn.o_proj",
    "mixer.o_proj",
    "temporal_block.o_proj",
    "shared_transf.self_attn.o_proj",
    "shared_transformer.self_attn.o_proj",
    "self_attn.o_proj.linear",
    "self_attn.out_proj",
    "self_attn.dense",
    "self_attention.dense",
    "attention.dense",
    "multi_head_attention.dense",
    "attn.out_proj",
    "attn.attention.out_proj",
    "norm_attn_norm.attn.out_proj",
    "attn.c_proj",
    "attn.Wo",
    "attention.output.dense",
    "attention.out_lin",
    "layer.0.SelfAttention.o",
    "self_att.self_attention.attention_out",
    "out_lin",
)

# what configs call the switch for a bias on the output projection, in the order in which they are tried; several at
# once where one alone is no valid config. A family has such a switch if its stock code, built with the switch on, has
# such a bias and differs in nothing but biases (see `stock.py`)
BIAS_FLAGS = (
    ("attention_bias",),
    ("attention_bias", "mlp_bias"),
    ("attention_out_bias",),
    ("use_bias",),
    ("bias",),
    ("enable_bias",),
)


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        model_type: the config's name for it.
        projections: the output projection's path inside a layer; of several, each layer has the first that is there.
        export_as: the model_type whose stock code computes the same and knows one of the `BIAS_FLAGS`, where the
            family's own does not.
        ffn: the feed-forward block's path inside a layer.
    """

    model_type: str
    projections: tuple[str, ...] = ("self_attn.o_proj",)
    export_as: str | None = None
    ffn: str = "mlp"


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("llama"),
        Architecture("gemma"),
        Architecture("gemma2"),
        Architecture("gemma3_text"),
        Architecture("qwen3"),
        Architecture("mistral", export_as="llama"),
        Architecture("qwen2", export_as="llama"),
    )
}

# families without a row: a linear of a usual name whose inputs are heads x head_dim
GENERIC = Architecture("*", PROJECTIONS)

# families that cannot be patched, and why, where the names of their modules alone would not tell
REFUSED = {
    "deepseek_v4": "groups of its heads are mixed before the output projection",
    "hrm_text": "it has two stacks of layers, each of which runs several times",
    "jetmoe": "its heads are experts, each with an output projection of its own",
    "longcat_flash": "each of its layers has two attentions",
    "reformer": "its layers run inside one autograd function, which gives vectors in them no gradients",
    "xlnet": "its attention multiplies by a parameter, and has no projection to wrap",
}

# of families whose code calls the projection or multiplies by its weight: the attention's attribute which, if true,
# means the latter
BYPASSES = {
    "bloom": "slow_but_exact",
}
