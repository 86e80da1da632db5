"""A merged SmolLM2 on a real server: its logits and greedy answers beside the patched model's, and the base as control.

    python -m benchmarks.proof.server_answers --server llama.cpp --python .venv-llamacpp/bin/python [--json FILE]

`make verify-llamacpp` and `make verify-vllm` run it. The adapter has drawn offsets on every third head of each layer.
Ours is the patched model in float32, computed by transformers; the server has the merged export, in an environment of
its own, and gets token ids. The unmerged base, written in the same way, is the control: it must not answer as the
patched model does. How far float32 itself is from float64 here, on every fifth prompt, says what may be rounding.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

import lofit_fast as lf
from lofit_fast.files import write_json
from lofit_fast.models.load import gguf_file, load_model

MODEL = "smollm2"
# the prompts are all of one with all of the other: 200
PLACES = (
    *("France", "Japan", "Brazil", "Egypt", "Canada", "India", "Kenya", "Norway", "Peru", "China"),
    *("Spain", "Chile", "Ghana", "Italy", "Cuba", "Nepal", "Greece", "Iran", "Fiji", "Poland"),
)
QUESTIONS = (
    "The capital of {} is",
    "The largest city in {} is",
    "People in {} speak",
    "The currency of {} is called the",
    "A famous dish from {} is",
    "The flag of {} has the colors",
    "Q: Which continent is {} on?\nA:",
    "The climate of {} is mostly",
    "To travel to {}, you should first",
    "The history of {} began when",
)
BATCH, SPREAD, SEED = 20, 0.15, 11
SCRIPTS = Path(__file__).parent


@dataclass(frozen=True)
class Target:
    """script: what answers on the server. write: by what it is called, (handle, folder, tokenizer) -> what the script
    is given; the first, "merged", in float32.
    """

    script: str
    write: Mapping[str, Callable[[lf.LofitHandle, Path, Any], Path]]


def _gguf(handle: lf.LofitHandle, folder: Path, tokenizer: Any, gguf_type: str = "f32") -> Path:
    return lf.export(handle, folder, target="llama.cpp", template=gguf_file(MODEL), gguf_type=gguf_type) / "model.gguf"


def _folder(handle: lf.LofitHandle, folder: Path, tokenizer: Any) -> Path:
    return lf.export(handle, folder, tokenizer, target="vllm")


TARGETS = {
    "llama.cpp": Target(
        "llama_cpp_answers.py", {"merged": _gguf, "merged, matrices in 4 bits": partial(_gguf, gguf_type="as-is")}
    ),
    "vllm": Target("vllm_answers.py", {"merged": _folder}),
}
# of the prompts, for float64
EVERY = 5


def offsets(model: nn.Module) -> lf.LofitHandle:
    """The model, patched with drawn offsets."""
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    chosen = [(layer, head) for layer in range(layers) for head in range(layer % 3, heads, 3)]
    handle = lf.patch(model, lf.LofitConfig(offset=chosen))
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * SPREAD)
    return handle


@torch.no_grad()
def ours(model: nn.Module, ids: list[list[int]], new_tokens: int) -> dict[str, np.ndarray]:
    """What transformers computes of the model: `logits` (B, V) after each prompt, `greedy` (B, n)."""
    logits, greedy = [], []
    # prompts of one length need no padding
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    for rows in _of_one_length(order, ids):
        batch = torch.tensor([ids[row] for row in rows])
        known, answers = None, []
        for _ in range(new_tokens):
            output = model(batch, past_key_values=known, use_cache=True, logits_to_keep=1)
            known, last = output.past_key_values, output.logits[:, -1]
            if not answers:
                logits.append(last)
            answers.append(last.argmax(-1))
            batch = answers[-1][:, None]
        greedy.append(torch.stack(answers, 1))
    back = np.argsort(order)
    return {"logits": torch.cat(logits).numpy()[back], "greedy": torch.cat(greedy).numpy()[back]}


def _of_one_length(order: list[int], ids: list[list[int]]) -> list[list[int]]:
    groups: list[list[int]] = []
    for row in order:
        if groups and len(groups[-1]) < BATCH and len(ids[groups[-1][0]]) == len(ids[row]):
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def compared(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    """How a server's answers agree with those of a model here."""
    logits = want["logits"]
    top = logits.argmax(1)
    seen = {
        "top1_agreement": float((got["greedy"][:, 0] == top).mean()),
        "greedy_answers_equal": float((got["greedy"] == want["greedy"]).all(1).mean()),
    }
    if "logits" in got:
        difference = float(np.abs(got["logits"] - logits).max())
        seen |= {"largest_logit_difference": difference, "largest_logit": float(np.abs(logits).max())}
    else:
        shifted = logits - logits.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        chosen = log_p[np.arange(len(log_p)), got["greedy"][:, 0]]
        seen["largest_logprob_difference"] = float(np.abs(got["logprob"] - chosen).max())
    return seen


def run(server: str, python: str, new_tokens: int, count: int) -> dict[str, Any]:
    """Write merged and base, let the server answer, compare. Raises ValueError where the server fails."""
    target = TARGETS[server]
    model, tokenizer = load_model(MODEL, dtype="float32", device="cpu")
    texts = [question.format(place) for place in PLACES for question in QUESTIONS][:count]
    prompts = {"texts": texts, "ids": [tokenizer(t)["input_ids"] for t in texts], "new_tokens": new_tokens}
    base = ours(model, prompts["ids"], new_tokens)
    handle = offsets(model)
    patched = ours(model, prompts["ids"], new_tokens)
    rounding = _rounding(model, prompts["ids"][::EVERY], base["logits"][::EVERY], patched["logits"][::EVERY])
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        (place / "prompts.json").write_text(json.dumps(prompts))
        served = {
            name: write(handle, place / f"file-{n}", tokenizer) for n, (name, write) in enumerate(target.write.items())
        }
        for vectors in handle.parameters():
            vectors.data.zero_()
        served["base"] = target.write["merged"](handle, place / "base", tokenizer)
        answers = {name: _answers(python, target.script, path, place) for name, path in served.items()}
    rows = {f"{name} on the server, patched here": compared(answers[name], patched) for name in target.write}
    rows |= {
        "base on the server, base here": compared(answers["base"], base),
        "control: base on the server, patched here": compared(answers["base"], patched),
    }
    same = float(np.mean(answers["merged"]["same_ids"]))
    return {"server": server, "version": _version(python, server), "model": MODEL, "prompts": len(texts)} | {
        "new_tokens": new_tokens,
        "dtype": "float32",
        "server_tokenizes_alike": same,
        "float32_from_float64": rounding,
        "rows": rows,
    }


def _rounding(model: nn.Module, ids: list[list[int]], base: np.ndarray, patched: np.ndarray) -> dict[str, float]:
    """The largest difference of logits here between float32 and float64, of the patched model and of the base."""
    wide = copy.deepcopy(model).double()
    seen = {"patched": float(np.abs(ours(wide, ids, 1)["logits"] - patched).max())}
    with lf.handle_of(wide).disabled():
        seen["base"] = float(np.abs(ours(wide, ids, 1)["logits"] - base).max())
    return seen


def _answers(python: str, script: str, path: Path, place: Path) -> dict[str, np.ndarray]:
    out = place / f"{path.parent.name}-{path.stem}.npz"
    command = [python, str(SCRIPTS / script), str(path), str(place / "prompts.json"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{script} failed with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    with np.load(out) as found:
        return dict(found)


_VERSIONS = {
    "llama.cpp": "from importlib.metadata import version; import json, cyllama, pathlib; "
    "path = pathlib.Path(cyllama.__file__).parent / 'build_config.json'; "
    "built = json.loads(path.read_text())['versions']['llama_cpp_version']; "
    "print('cyllama', version('cyllama') + ', llama.cpp', built)",
    "vllm": "from importlib.metadata import version; print('vllm', version('vllm'))",
}


def _version(python: str, server: str) -> str:
    return subprocess.run([python, "-c", _VERSIONS[server]], capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Print, and store, how the server answers. Exits with 1 unless it answers as the patched model does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--server", choices=TARGETS, required=True)
    parser.add_argument("--python", required=True, help="of the environment that has the server")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=len(PLACES) * len(QUESTIONS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    result = run(asked.server, asked.python, asked.new_tokens, asked.prompts)
    print(f"{result['version']}, SmolLM2-135M-Instruct in float32, {result['prompts']} prompts")
    for name, row in result["rows"].items():
        print(f"  {name}: " + ", ".join(f"{key.replace('_', ' ')} {value:.6g}" for key, value in row.items()))
    rounding = ", ".join(f"{name} {value:.3g}" for name, value in result["float32_from_float64"].items())
    print(f"  float32 from float64 here: {rounding}")
    print(f"  prompts that the server's own tokenizer reads alike: {result['server_tokenizes_alike']:.0%}")
    if asked.json is not None:
        write_json(asked.json, result)
    merged, *_, control = result["rows"].values()
    return int(merged["top1_agreement"] < 0.99 or control["greedy_answers_equal"] > 0.5)


if __name__ == "__main__":
    sys.exit(main())
