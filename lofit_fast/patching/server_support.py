"""Which servers keep a bias on the output projection, for which families: read in their sources, as data.

A server runs code of its own for a family. Where that code builds the projection without a bias, most servers pass over
the bias in the file without a word, and answer as the base model would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# what a server is asked by: the class that the exported folder's config names
LLAMA, MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"


@dataclass(frozen=True)
class Server:
    """What was read of one server.

    source: the release or commit that was read. date: of the release, or when it was read. keeps, drops: the classes
    whose code there has a bias on the output projection, or has none, and the file that says so. otherwise: what
    becomes of a bias that has no place. instead: what a user can do then.
    """

    source: str
    date: str
    keeps: Mapping[str, str]
    drops: Mapping[str, str]
    otherwise: str
    instead: str


_TRANSFORMERS_CODE = (
    "write the folder for transformers and start the server with {flag}, which runs transformers' own code, or keep "
    "the adapter folder"
)
_ADAPTER = "keep the adapter folder, or export for another server"

SERVERS: dict[str, Server] = {
    "vllm": Server(
        source="vllm 0.33.0",
        date="2026-11-01",
        keeps={
            LLAMA: "llama.py: bias_o_proj is config.attention_bias",
            MISTRAL: "mistral.py, which builds llama.py's layers",
            "InternLM3ForCausalLM": "llama.py, by config.bias",
            "GraniteForCausalLM": "granite.py",
            "GraniteMoeHybridForCausalLM": "granitemoehybrid.py",
            "Gemma2ForCausalLM": "gemma2.py",
            "Gemma3ForCausalLM": "gemma3.py",
            "Gemma3nForCausalLM": "gemma3n.py",
            "ApertusForCausalLM": "apertus.py",
            "NemotronForCausalLM": "nemotron.py",
            "Exaone4ForCausalLM": "exaone4.py",
            "OPTForCausalLM": "opt.py, by config.enable_bias",
            "FalconForCausalLM": "falcon.py, by config.bias",
            "GPT2LMHeadModel": "gpt2.py, always",
            "BloomForCausalLM": "bloom.py, always",
            "GptOssForCausalLM": "gpt_oss.py, always",
        },
        drops={
            "GemmaForCausalLM": "gemma.py: bias=False",
            "Qwen2ForCausalLM": "qwen2.py: bias=False",
            "Qwen2MoeForCausalLM": "qwen2_moe.py: bias=False",
            "Qwen3ForCausalLM": "qwen3.py: bias=False, and attention_bias is that of q, k and v alone",
            "Qwen3MoeForCausalLM": "qwen3_moe.py: bias=False",
            "CohereForCausalLM": "commandr.py: bias=False",
            "Cohere2ForCausalLM": "commandr.py: bias=False",
            "Ernie4_5ForCausalLM": "ernie45.py: the bias is taken away",
            "Ernie4_5_MoeForCausalLM": "ernie45_moe.py: bias=False",
            "GraniteMoeForCausalLM": "granitemoe.py: bias=False",
            "MixtralForCausalLM": "mixtral.py: bias=False",
            "OlmoeForCausalLM": "olmoe.py: bias=False",
            "StableLmForCausalLM": "stablelm.py: bias=False",
            "Glm4ForCausalLM": "glm4.py: bias=False",
            "FalconH1ForCausalLM": "falcon_h1.py: bias=False",
        },
        otherwise="passes over it without a word (AutoWeightsLoader.load_weights ignores unexpected names in .bias)",
        instead=_TRANSFORMERS_CODE.format(flag="--model-impl transformers"),
    ),
    "sglang": Server(
        source="sglang 0.5.23",
        date="2026-10-30",
        keeps={
            LLAMA: "llama.py: bias is config.attention_bias",
            MISTRAL: "mistral.py, which is llama.py's class",
            "Qwen3ForCausalLM": "qwen3.py: bias is config.attention_bias",
            "Qwen3MoeForCausalLM": "qwen3_moe.py",
            "Gemma2ForCausalLM": "gemma2.py",
            "Gemma3ForCausalLM": "gemma3_causal.py",
            "ApertusForCausalLM": "apertus.py",
            "ArceeForCausalLM": "arcee.py",
            "Exaone4ForCausalLM": "exaone4.py",
            "OlmoForCausalLM": "olmo.py",
            "Olmo2ForCausalLM": "olmo2.py",
            "OPTForCausalLM": "opt.py, by config.enable_bias",
            "Starcoder2ForCausalLM": "starcoder2.py, by config.use_bias",
            "GPT2LMHeadModel": "gpt2.py, always",
            "GptOssForCausalLM": "gpt_oss.py",
        },
        drops={
            "GemmaForCausalLM": "gemma.py: bias=False",
            "Qwen2ForCausalLM": "qwen2.py: bias=False",
            "Qwen2MoeForCausalLM": "qwen2_moe.py: bias=False",
            "GraniteForCausalLM": "granite.py: bias=False",
            "GraniteMoeForCausalLM": "granitemoe.py: bias=False",
            "CohereForCausalLM": "commandr.py: bias=False",
            "MixtralForCausalLM": "mixtral.py: bias=False",
            "OlmoeForCausalLM": "olmoe.py: bias=False",
            "StableLmForCausalLM": "stablelm.py: bias=False",
            "Glm4ForCausalLM": "glm4.py: bias=False",
        },
        otherwise="passes over it without a word (load_weights skips names in .bias that it does not know)",
        instead=_TRANSFORMERS_CODE.format(flag="--model-impl transformers"),
    ),
    "tgi": Server(
        source="text-generation-inference 3.3.7, commit db931fc",
        date="2026-01-08",
        keeps={
            LLAMA: "flash_llama_modeling.py: bias is config.attention_bias",
            "GraniteForCausalLM": "flash_llama_modeling.py",
            "CohereForCausalLM": "flash_cohere_modeling.py",
            "Starcoder2ForCausalLM": "flash_starcoder2_modeling.py, by config.use_bias",
        },
        drops={
            MISTRAL: "flash_mistral_modeling.py: bias=False",
            "GemmaForCausalLM": "flash_gemma_modeling.py: bias=False",
            "Gemma2ForCausalLM": "flash_gemma2_modeling.py: bias=False",
            "Gemma3ForCausalLM": "flash_gemma3_modeling.py: bias=False",
            "Qwen2ForCausalLM": "flash_qwen2_modeling.py: bias=False",
        },
        otherwise="passes over it without a word (a tensor that nobody asks for is not read)",
        instead=_ADAPTER,
    ),
    "llama.cpp": Server(
        source="llama.cpp commit 0c1e570 (as in llama-cpp-python 0.3.36)",
        date="read 2026-11-29",
        keeps={
            LLAMA: "src/models/llama.cpp: attn_output.bias, where a file has it",
            MISTRAL: "src/models/llama.cpp: the same architecture there",
        },
        drops={
            "GemmaForCausalLM": "src/models/gemma.cpp",
            "Gemma2ForCausalLM": "src/models/gemma2.cpp",
            "Gemma3ForCausalLM": "src/models/gemma3.cpp",
            "Qwen2ForCausalLM": "src/models/qwen2.cpp",
            "Qwen3ForCausalLM": "src/models/qwen3.cpp",
            "CohereForCausalLM": "src/models/command-r.cpp",
            "Olmo2ForCausalLM": "src/models/olmo2.cpp",
        },
        otherwise="refuses the whole file (wrong number of tensors)",
        instead=_ADAPTER,
    ),
}


def check_served(target: str, model_class: type, has_offsets: bool) -> None:
    """Raise ValueError, with the reason, where a server would not add the offsets of a model of this class.

    target: a key of `SERVERS`. model_class: that of the exported model. has_offsets: scales alone are weights like any
    others, which every server has.
    """
    server, name = SERVERS[target], model_class.__name__
    if not has_offsets or name in server.keeps:
        return
    where = server.drops.get(name)
    if where is None:
        raise ValueError(
            f"cannot export a {name} for {target}: whether {target} has a bias on its output projection, where the "
            f"offsets are, was not read in its sources ({server.source}). Known to keep it: "
            f"{', '.join(sorted(server.keeps))}. Otherwise {server.instead}"
        )
    raise ValueError(
        f"cannot export a {name} for {target}: its code has no bias on the output projection, where the offsets are "
        f"({server.source}, {server.date}: {where}), and {target} {server.otherwise}. Instead, {server.instead}"
    )
