"""Tokenizers that fit the tiny models' 97 ids: one of characters, and one of the words of family stories."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
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
