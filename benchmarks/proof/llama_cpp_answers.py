"""What llama.cpp answers: run by the Python of an environment that has cyllama, which knows nothing of this project.

    PYTHON benchmarks/proof/llama_cpp_answers.py MODEL.gguf PROMPTS.json ANSWERS.npz

PROMPTS.json: {"texts": [...], "ids": [[...], ...], "new_tokens": n}. ANSWERS.npz: `logits` (B, V) float32 after each
prompt, `greedy` (B, n) int64, `same_ids` (B,): whether llama.cpp's own tokenizer, which has the file's metadata only,
makes the same ids of the text.
"""

import json
import sys

import numpy as np
from cyllama.llama.llama_cpp import (
    LlamaBatch,
    LlamaContext,
    LlamaContextParams,
    LlamaModel,
    LlamaModelParams,
    disable_logging,
)

# prompts that are computed at the same time
TOGETHER, LONGEST = 20, 96
F32 = 0


class Model(LlamaModel):
    """cyllama's, with the number that its `get_logits_ith` asks for and cyllama 0.2.18 forgets."""

    @property
    def n_vocab(self) -> int:
        """How many logits a token has."""
        return self.get_vocab().n_vocab


def main(model_file: str, prompts_file: str, answers_file: str) -> None:
    """Answer all prompts."""
    disable_logging()
    with open(prompts_file, encoding="utf-8") as file:
        prompts = json.load(file)
    model = Model(path_model=model_file, params=LlamaModelParams(), verbose=False)
    vocab, how = model.get_vocab(), LlamaContextParams()
    # in float32 throughout: the cache too
    how.type_k = how.type_v = F32
    how.flash_attn_type = 0
    how.n_ctx, how.n_seq_max = TOGETHER * LONGEST, TOGETHER
    how.n_batch = how.n_ubatch = TOGETHER * LONGEST
    how.kv_unified = True
    how.n_threads = how.n_threads_batch = 1
    context = LlamaContext(model, how, verbose=False)
    logits, greedy = [], []
    for start in range(0, len(prompts["ids"]), TOGETHER):
        first, answers = answered(context, prompts["ids"][start : start + TOGETHER], prompts["new_tokens"])
        logits.append(first)
        greedy.append(answers)
    pairs = zip(prompts["texts"], prompts["ids"], strict=True)
    same = [list(vocab.tokenize(text, True, True)) == ids for text, ids in pairs]
    np.savez(answers_file, logits=np.concatenate(logits), greedy=np.concatenate(greedy), same_ids=np.array(same))


def answered(context: LlamaContext, rows: list[list[int]], new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(logits after each prompt, the greedy answers) of a few prompts, each a sequence of its own."""
    context.kv_cache_clear()
    given = [list(enumerate(ids)) for ids in rows]
    first, answers = None, []
    for _ in range(new_tokens):
        batch, last = LlamaBatch(n_tokens=TOGETHER * LONGEST, embd=0, n_seq_max=1), []
        for sequence, tokens in enumerate(given):
            for number, (position, token) in enumerate(tokens):
                batch.add(token, position, [sequence], number == len(tokens) - 1)
            last.append(batch.n_tokens - 1)
        context.decode(batch)
        logits = np.array([context.get_logits_ith(place) for place in last], dtype=np.float32)
        first = logits if first is None else first
        answers.append(logits.argmax(1))
        given = [[(tokens[-1][0] + 1, int(token))] for tokens, token in zip(given, answers[-1], strict=True)]
    return first, np.stack(answers, 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
