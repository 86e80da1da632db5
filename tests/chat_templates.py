"""Chat templates as families write them, shortened: how turns begin and end, what is trimmed, moved or left out."""

from dataclasses import dataclass

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% if loop.index0 > ns.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GPT_OSS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if loop.last and m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "<|start|>assistant{% endif %}<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role | capitalize }}:{{ ' ' + m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# as those do that take a content in parts
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{{ part.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A template, its special tokens, and which tokenizer of `KINDS`; preamble: what that puts before plain texts.

    every, last: what is learned of the test's conversation with train_on "all" and "last", or what is said instead:
    a text beginning with "!".
    """

    template: str
    special: tuple[str, ...]
    every: tuple[str, ...] | str
    last: tuple[str, ...] | str
    kind: str = "qwen"
    preamble: str = ""


_IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "chatml": Family(CHATML, _IM, ("Hello.<|im_end|>", " Four. <|im_end|>"), (" Four. <|im_end|>",)),
    "chatml with a bos in the tokenizer": Family(
        CHATML, _IM, ("Hello.<|im_end|>", " Four. <|im_end|>"), (" Four. <|im_end|>",), kind="llama3"
    ),
    "chatml as plain text": Family(CHATML, (), ("Hello.<|im_end|>", " Four. <|im_end|>"), (" Four. <|im_end|>",)),
    "marked": Family(MARKED, _IM, ("Hello.<|im_end|>", " Four. <|im_end|>"), (" Four. <|im_end|>",)),
    "marked, without the ending": Family(
        MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
        _IM,
        ("Hello.<|im_end|>", " Four. <|im_end|>"),
        (" Four. <|im_end|>",),
    ),
    "marked, with the header": Family(
        MARKED.replace("{% generation %}", "")
        .replace(
            "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}",
            "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n",
        )
        .replace("{% else %}", "{% else %}<|im_start|>{{ m.role }}\n"),
        _IM,
        ("Hello.<|im_end|>", " Four. <|im_end|>"),
        (" Four. <|im_end|>",),
    ),
    "llama3": Family(
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("Hello.<|eot_id|>", "Four.<|eot_id|>"),
        ("Four.<|eot_id|>",),
        kind="llama3",
    ),
    "gemma": Family(
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        ("Hello.<end_of_turn>", "Four.<end_of_turn>"),
        ("Four.<end_of_turn>",),
        kind="gemma",
    ),
    "mistral": Family(MISTRAL, (), (" Hello.</s>", " Four.</s>"), (" Four.</s>",), kind="mistral_v01"),
    "mistral v3": Family(MISTRAL, ("[INST]", "[/INST]"), (" Hello.</s>", " Four.</s>"), (" Four.</s>",), kind="tekken"),
    "llama2": Family(LLAMA2, (), (" Hello. </s>", " Four. </s>"), (" Four. </s>",), kind="llama2"),
    "llama2 legacy": Family(LLAMA2, (), (" Hello. </s>", " Four. </s>"), (" Four. </s>",), kind="llama2_legacy"),
    "qwen3": Family(
        QWEN3,
        _IM,
        "!message 2 .* the chat template changes earlier turns",
        ("<think>\n\n</think>\n\n Four. <|im_end|>",),
    ),
    "r1": Family(R1, ("<|User|>", "<|Assistant|>"), "!message 4 .* no beginning", "!message 4 .* no beginning"),
    "glm": Family(
        GLM,
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
        ("Hello.", " Four. </s>"),
        (" Four. </s>",),
        preamble="[gMASK] <sop>",
    ),
    "gpt-oss": Family(
        GPT_OSS,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        ("<|channel|>final<|message|>Hello.<|end|>", "<|channel|>final<|message|> Four. <|return|>"),
        ("<|channel|>final<|message|> Four. <|return|>",),
    ),
    "phi": Family(
        PHI, ("<|user|>", "<|assistant|>", "<|end|>"), ("Hello.<|end|>", " Four. <|end|>"), (" Four. <|end|>",)
    ),
    "phi as plain text": Family(PHI, (), ("Hello.<|end|>", " Four. <|end|>"), (" Four. <|end|>",)),
    # the full stop and the line break after it are one token
    "no endings": Family(PLAIN, (), (" Hello.\n", "  Four. \n</s>"), ("  Four. \n</s>",)),
    "contents in parts": Family(PARTS, _IM, "!message 1 .* leaves its content out", "!message 1 .* leaves its content"),
}
