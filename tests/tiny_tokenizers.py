"""Tokenizers that fit the tiny models' 97 ids (characters; words of family stories), and small ones of many kinds."""

import functools
import json
from collections.abc import Callable, Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lofit_fast.tasks.kinship import RELATIONS

PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SPECIAL = (PAD, BOS, EOS, UNKNOWN)
# printable ASCII without two signs nobody needs: there are 97 ids in all
CHARACTERS = tuple(chr(code) for code in range(32, 127) if chr(code) not in "`~")
VOCABULARY = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# everything else in a story, names above all, is unknown
WORDS = (
    *RELATIONS,
    "husband",
    "wife",
    "Story:",
    "Question:",
    "Answer:",
    "How",
    "is",
    "related",
    "to",
    "and",
    "his",
    "her",
)


def tiny_tokenizer(bos: bool = True, eos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """Ids: pad 0, bos 1, eos 2, unknown 3, then a character each. bos, eos: put around texts as a special token."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos or eos:
        around = [BOS] * bos + ["$A"] + [EOS] * eos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(around), special_tokens=[(BOS, VOCABULARY[BOS]), (EOS, VOCABULARY[EOS])]
        )
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, for stories that are too long in characters; the white space between words is lost."""
    tokenizer = Tokenizer(models.WordLevel({t: n for n, t in enumerate((*SPECIAL, *WORDS))}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


# what the tokenizers below are trained on: words with and without a space before them, digits, line breaks, signs
CORPUS = (
    "The capital of France is Paris. Question: who wrote the letter? Answer: the man from the north wrote it.",
    "Q: 12 + 34 = 46, and 7 * 8 = 56.\nA: yes\n\nQ: is it so?\nA: no, it isn't; he's late.",
    "def area(x, y):\n    return x * y\n\n\nprint(area(3, 4))  # 12",
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe \u6771\u4eac \u5927\u962a \U0001f642 \U0001f44d",
)
# the pre-tokenizers' patterns of byte-level families
GPT4 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(pattern: str | None, bos: bool, normalizer=None) -> PreTrainedTokenizerFast:
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer = _trained(pre_tokenizers.Sequence([*split, level]), pre_tokenizers.ByteLevel.alphabet())
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return _wrapped(tokenizer, bos)


def _sentencepiece(normalizer, pre_tokenizer) -> PreTrainedTokenizerFast:
    # no piece has a space but at its beginning, whatever texts are cut into
    content = json.loads(_trained(pre_tokenizers.Metaspace(prepend_scheme="always"), []).to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    content["model"] |= {"byte_fallback": True, "unk_token": UNKNOWN}
    content["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return _wrapped(tokenizer, bos=True)


def _trained(pre_tokenizer, alphabet: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    # twice, so that its words are worth a token each
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    return tokenizer


def _wrapped(tokenizer: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _prepended() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])


# how families cut text: what is put before it, what pieces it falls into, what is in front
KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": lambda: _byte_level(None, bos=False),
    "llama3": lambda: _byte_level(QWEN, bos=True),
    "qwen": lambda: _byte_level(QWEN, bos=False, normalizer=normalizers.NFC()),
    "tekken": lambda: _byte_level(GPT4, bos=True),
    "llama2_legacy": lambda: _sentencepiece(_prepended(), None),
    "mistral_v01": lambda: _sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "llama2": lambda: _sentencepiece(None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "gemma": lambda: _sentencepiece(normalizers.Replace(" ", "\u2581"), None),
}


@functools.cache
def kind_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts text as a family's does, trained on a few lines; of `KINDS`. Shared: do not change it."""
    return KINDS[name]()


def chat_tokenizer(kind: str, template: str, special: Iterable[str], preamble: str = "") -> PreTrainedTokenizerFast:
    """One of `KINDS` of its own, with a chat template and its special tokens. preamble: put before plain texts."""
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    if preamble:
        pieces = preamble.split()
        pairs = [(piece, tokenizer.convert_tokens_to_ids(piece)) for piece in pieces]
        processor = processors.TemplateProcessing(single=f"{preamble} $A", special_tokens=pairs)
        tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


class Slow:
    """The same tokens without offsets."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, add_special_tokens=True):
        assert isinstance(text, str)
        return {"input_ids": self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]}
