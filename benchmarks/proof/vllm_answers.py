"""What vLLM answers: run by the Python of an environment that has vLLM, which knows nothing of this project.

    PYTHON benchmarks/proof/vllm_answers.py FOLDER PROMPTS.json ANSWERS.npz

Untested without such a machine. PROMPTS.json and ANSWERS.npz: as of `llama_cpp_answers.py`, with `logprob` (B,) of the
first greedy token in place of all logits, which vLLM does not give.
"""

import json
import sys

import numpy as np
from vllm import LLM, SamplingParams


def main(folder: str, prompts_file: str, answers_file: str) -> None:
    """Answer all prompts."""
    with open(prompts_file, encoding="utf-8") as file:
        prompts = json.load(file)
    model = LLM(folder, dtype="float32", enforce_eager=True)
    how = SamplingParams(temperature=0.0, max_tokens=prompts["new_tokens"], ignore_eos=True, logprobs=1)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts["ids"]], how)
    answers = [output.outputs[0] for output in outputs]
    greedy = np.array([list(answer.token_ids) for answer in answers])
    logprob = np.array([answer.logprobs[0][answer.token_ids[0]].logprob for answer in answers])
    tokenizer = model.get_tokenizer()
    same = [tokenizer(text)["input_ids"] == ids for text, ids in zip(prompts["texts"], prompts["ids"], strict=True)]
    np.savez(answers_file, greedy=greedy, logprob=logprob, same_ids=np.array(same))


if __name__ == "__main__":
    main(*sys.argv[1:])
