"""Bad calls of every command: exit code 1 or 2, one line that says what was got, no traceback, nothing written."""

import json
import os
import random
import shutil
import signal
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

import lofit_fast as lf
from lofit_fast.cli.app import app
from tests.cli.calling import QUICK_STEP2
from tests.tiny_models import tiny_model

NO_NUMBER = ("nan", "x", "", " ")
RATES = (*NO_NUMBER, "inf", "-inf", "0", "-1", "1e400", "1e-400")
COUNTS = (*NO_NUMBER, "0", "-1", "1.5", "inf", "1e3", "9" * 5000)
# a file or folder that is none of what is read -> how it is made
PATHS = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "nowhere": lambda path: path.symlink_to(path.parent / "gone"),
    "itself": lambda path: path.symlink_to(path),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "latin": lambda path: path.write_bytes(b'{"heads": "\xe9\xff"}'),
    "utf16": lambda path: path.write_text('{"heads": [[0, 0]]}', encoding="utf-16"),
    "deep": lambda path: path.write_text("[" * 10**5),
    "deeper": lambda path: path.write_text('{"a":' * 10**5),
    "null": lambda path: path.write_text("null"),
    "nan": lambda path: path.write_text('{"heads": [[NaN, 1e400]], "seed": null}'),
    "digits": lambda path: path.write_text("9" * 5000),
    "cut": lambda path: path.write_text('{"heads": [[0, 1'),
}
DEVICES = ("meta", "nonsense", "", "cuda:99", "cpu:x", "present", "xla", "hpu", "vulkan", "\0", "é")
WORDS = ("nonsense", "", "\0", "é" * 3000)
READING = {
    "--split": ("test", ""),
    "--subset": ("x", ""),
    "--columns": ("x", "", "=", "prompt=", "=a", "a=b", "prompt=a,prompt=b", "prompt=a,completion=a", "prompt=nope"),
    "--train-on": WORDS,
}
TRAINING = {
    "--train-size": (*COUNTS, "9" * 30),
    "--top": (*NO_NUMBER, "inf", "0", "-1", "1.5", "1e400", "9" * 30, "all"),
    "--min-layer": (*NO_NUMBER, "-1", "99", "9" * 30),
    "--select-lr": RATES,
    "--l1": (*NO_NUMBER, "inf", "-1"),
    "--select-epochs": (*NO_NUMBER, "-1", "1.5"),
    "--batch-size": COUNTS,
    "--positions": WORDS,
    "--seed": (*NO_NUMBER, "-1", "4294967296", "9" * 30),
    "--dtype": WORDS,
    "--device": DEVICES,
}
# command -> option -> values that it refuses
VALUES = {
    "train": {
        **READING,
        **TRAINING,
        "--tune-lr": RATES,
        "--tune-epochs": (*NO_NUMBER, "-1"),
        "--accumulation-steps": (*COUNTS, "3"),
        "--max-length": (*COUNTS, "1"),
        "--select-examples": (*COUNTS, "3"),
        "--beta": (*RATES, "1"),
        "--select": WORDS,
        "--attention": ("flex_attention", *WORDS),
        "--frozen-products": (*WORDS, "fp8"),
        "--prefix-cache-gb": (*NO_NUMBER, "inf", "-1", "1e400"),
        "--prompt-cache-gb": (*NO_NUMBER, "inf", "-1", "1"),
        "--task": ("nonsense", "clutrr", "truthfulqa", "mmlu"),
    },
    "select": {**READING, **TRAINING, "--select-examples": COUNTS, "--method": (*WORDS, "tune")},
    "eval": {
        **READING,
        "--batch-size": COUNTS,
        "--seed": NO_NUMBER,
        "--dtype": WORDS,
        "--device": DEVICES,
        "--task": ("nonsense", "clutrr", "truthfulqa"),
    },
    "generate": {"--max-new-tokens": (*COUNTS, "9" * 30), "--dtype": WORDS, "--device": DEVICES},
    "export": {
        "--dtype": (*WORDS, "auto8"),
        "--for": WORDS,
        "--gguf-type": WORDS,
        "--peft-method": WORDS,
        "--template": WORDS,
    },
    "plan": {
        "--tokens": (*COUNTS, "9" * 30),
        "--scale": (*NO_NUMBER, "inf", "-inf", "1e400", "0", "-1", "1.5", "99", "some", "9" * 400),
        "--offset": ("nan", "inf", "0"),
        "--device": (*WORDS, "meta", "cpu", "T4"),
        "--dtype": WORDS,
        "--devices": (*COUNTS, "9" * 30),
        "--mode": (*WORDS, "ddp"),
        "--device-memory": (*NO_NUMBER, "80"),
    },
    "autotune": {
        "--tokens": (*COUNTS, "9" * 30),
        "--heads": (*NO_NUMBER, "inf", "0", "99"),
        "--backend": WORDS,
        "--rounds": COUNTS,
        "--device": DEVICES,
        "--dtype": WORDS,
    },
    "sweep": {
        "--jobs": COUNTS,
        "--together": COUNTS,
        "--devices": (*WORDS, "cuda:99", "0,,1", "cpu,cpu", "cpu,meta", "-1"),
    },
    "push": {"--repo": ("nobody", "a/b/c", "../up", "a/b@v1"), "--license": ("two\nlines", " ")},
    "serve": {
        "--adapter": ("nameless", "=a", "a=", "a b=c"),
        "--host": ("no.such.host.invalid", "127.0.0.999"),
        "--port": ("-1", "65536", "ninety"),
        "--max-new-tokens": COUNTS,
        "--queue": ("-1", *NO_NUMBER),
    },
}
for name in ("train", "select", "merge", "export", "convert-adapter", "push", "sweep"):
    VALUES.setdefault(name, {})["--output"] = ("", "\0")
# command -> options that name what is read
READ = {
    "train": ("--data", "--heads", "--model"),
    "select": ("--data", "--reference", "--model"),
    "eval": ("--data", "--adapter", "--model"),
    "generate": ("--adapter", "--model"),
    "merge": ("--adapter", "--model"),
    "export": ("--adapter",),
    "convert-adapter": ("--checkpoint", "--model"),
    "push": ("--adapter", "--run"),
    "plan": ("--adapter", "--model"),
    "autotune": ("--model",),
    "sweep": ("",),
}
CASES = [(name, option, value) for name, options in VALUES.items() for option, of in options.items() for value in of]
CASES += [(name, option, PATHS[path]) for name, options in READ.items() for option in options for path in PATHS]
FEW = random.Random(0).sample(range(len(CASES)), 40)


@contextmanager
def within(seconds):
    """A scope that does not wait for ever, as for a pipe that nobody writes to."""

    def stop(*_):
        raise AssertionError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(*folders):
    """Every file below, and what is in it as far as that can be read."""
    paths = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return {path: path.read_bytes() if path.is_file() and not path.is_symlink() else None for path in paths}


def refused(arguments, *folders):
    """The line that a bad call gives, which writes nothing into these folders."""
    before = tree(*folders)
    with within(60):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=200)
    assert result.exit_code in (1, 2), f"exit code {result.exit_code}: {result.output[-2000:]}\n{result.exception!r}"
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert tree(*folders) == before
    if result.exit_code == 2:
        return result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    assert len(lines[0]) < 2500
    assert lines[0] != "error: "
    return lines[0]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    lf.patch(tiny_model("llama"), lf.LofitConfig(offset=[(0, 0), (1, 2)])).save(folder)
    return folder


@pytest.fixture
def rest_of(model, data, adapter, tmp_path, monkeypatch):
    """command -> all other options that it takes to run; the cache is among the test's files."""
    monkeypatch.setenv("LOFIT_FAST_CACHE", str(tmp_path / "cache"))
    grid = tmp_path / "good.toml"
    grid.write_text(f'[base]\nmodel = "{model}"\ndata = "{data}"\n[grid]\nseed = [1]\n')
    read = {"--model": model, "--data": data}
    written = {"--output": tmp_path / "out"}
    quick = dict(zip(QUICK_STEP2[::2], QUICK_STEP2[1::2], strict=True))
    options = {
        "train": read | written | quick,
        "select": {key: value for key, value in (read | quick).items() if key != "--tune-epochs"}
        | {"--method": "lofit", "--top": 2, "--output": tmp_path / "heads.json"},
        "eval": read,
        "generate": {"--model": model, "--prompt": "a"},
        "merge": {"--model": model, "--adapter": adapter} | written,
        "export": {"--model": model, "--adapter": adapter} | written,
        "convert-adapter": {"--model": model, "--checkpoint": adapter} | written,
        "push": {"--model": model, "--adapter": adapter, "--repo": "me/mine"} | written,
        "serve": {"--model": model, "--port": 0},
        "plan": {"--model": model, "--tokens": 8},
        "autotune": {"--model": model, "--tokens": 8, "--rounds": 1, "--device": "cpu", "--dtype": "float32"},
        "sweep": {"": grid} | written,
    }

    def rest(name, option, value):
        given = {**options[name], option: value}
        words = [word for key, one in given.items() for word in ((key, one) if key else (one,))]
        return [name, *words]

    return rest


def check(case, rest_of, tmp_path):
    name, option, value = case
    path = None
    if callable(value):
        # rows are read by the type of their file
        path = tmp_path / ("bad.jsonl" if option == "--data" else "bad.toml" if name == "sweep" else "bad")
        value(path)
    line = refused(rest_of(name, option, value if path is None else path), tmp_path)
    if path is not None:
        assert path.name in line, line


def named(case):
    name, option, value = case
    of = next(key for key, made in PATHS.items() if made is value) if callable(value) else ascii(value)[:20]
    return f"{name} {option} {of}"


@pytest.mark.parametrize("case", [CASES[i] for i in sorted(FEW)], ids=named)
def test_a_bad_call_is_refused(case, rest_of, tmp_path):
    check(case, rest_of, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for i, case in enumerate(CASES) if i not in FEW], ids=named)
def test_every_bad_call_is_refused(case, rest_of, tmp_path):
    check(case, rest_of, tmp_path)


def _json(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _bytes(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _cut(name, share):
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * share))


def _pipe(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


# what is wrong with a base -> how it came to be so
BASES = {
    **{f"{name} cut to {share}": _cut(name, share) for name in ("model.safetensors", "tokenizer.json", "config.json")
       for share in (0, 0.3, 0.99)},
    **{f"{name} {label}": _bytes(name, content) for name in ("config.json", "tokenizer.json")
       for label, content in {"null": b"null", "list": b"[]", "deep": b"[" * 10**5, "text": b"\xff\xfe"}.items()},
    "a header of 2^60 bytes": _bytes("model.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
    "weights of zeros": _bytes("model.safetensors", bytes(5000)),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "a pipe for weights": _pipe("model.safetensors"),
    "a pipe for a config": _pipe("config.json"),
    "a pipe for a tokenizer": _pipe("tokenizer.json"),
    "an index that is cut": lambda folder: [_bytes("model.safetensors.index.json", b'{"weight_map": {')(folder),
                                            (folder / "model.safetensors").unlink()],
    **{f"{key}={value!r}": _json("config.json", **{key: value}) for key, value in
       [("hidden_size", None), ("hidden_size", -1), ("hidden_size", 0), ("hidden_size", 1e400), ("vocab_size", 7),
        ("num_attention_heads", 0), ("num_attention_heads", None), ("num_hidden_layers", None), ("model_type", None),
        ("model_type", "nonsense"), ("model_type", []), ("rms_norm_eps", "x"),
        ("dtype", "x"), ("rope_parameters", 3), ("hidden_act", "x"), ("head_dim", 7)]},
}  # fmt: skip
FEW_BASES = ("model.safetensors cut to 0.3", "config.json deep", "a pipe for weights", "hidden_size=None")


def check_base(name, model, data, tmp_path):
    folder = shutil.copytree(model, tmp_path / "base")
    BASES[name](folder)
    line = refused(("eval", "--model", folder, "--data", data), tmp_path)
    assert str(folder) in line, line


@pytest.mark.parametrize("name", FEW_BASES)
def test_a_damaged_base_is_refused(name, model, data, tmp_path):
    check_base(name, model, data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BASES if name not in FEW_BASES])
def test_every_damaged_base_is_refused(name, model, data, tmp_path):
    check_base(name, model, data, tmp_path)


# where nothing can be written
OUTPUTS = {
    "a file": lambda path: path.write_text("mine"),
    "below a file": lambda path: (path.write_text("mine"), path / "run")[1],
    "a name too long": lambda path: path.with_name("x" * 300),
    "a pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("where", OUTPUTS)
@pytest.mark.parametrize("name", ["merge", "sweep", pytest.param("train", marks=pytest.mark.slow)])
def test_an_output_that_is_no_folder(name, where, rest_of, tmp_path):
    path = tmp_path / "there"
    made = OUTPUTS[where](path)
    refused(rest_of(name, "--output", made if hasattr(made, "parts") else path), tmp_path)
