"""How a command ends: done, interrupted, unread, out of memory, or by a fault of ours; always in one line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from tqdm.auto import tqdm
from typer.testing import CliRunner

from lofit_fast.cli import command as command_module
from lofit_fast.cli.command import command, out, say_error, show


def app_of(action, **how):
    """An application of one command, which does something."""

    def does(as_json: bool = False) -> None:
        """Do it."""
        action()

    app = typer.Typer()
    command(app, "does", **how)(does)
    return app


def ending(action, *arguments, **how):
    """(exit code, standard output, standard error) of a command that does something."""
    result = CliRunner().invoke(app_of(action, **how), list(arguments))
    return result.exit_code, result.stdout, result.stderr


def raising(error):
    def action():
        raise error

    return action


def test_an_interrupt_is_one_line():
    assert ending(raising(KeyboardInterrupt())) == (130, "", "error: interrupted\n")
    code, _, said = ending(raising(KeyboardInterrupt()), goes_on=True)
    assert (code, said) == (130, "error: interrupted: the same command goes on where it was\n")
    code, said, _ = ending(raising(KeyboardInterrupt()), "--as-json")
    assert (code, json.loads(said)) == (130, {"error": "interrupted"})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("so"), KeyError("x")])
def test_a_bar_that_is_left_open_is_closed_before_the_line(error):
    bars = []

    def action():
        bars.append(tqdm(total=9))
        raise error

    _, _, said = ending(action)
    assert bars[0].disable
    assert said.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "error", [KeyError("x"), IndexError(), AssertionError("so"), RuntimeError("a\nb"), Exception()]
)
def test_a_fault_of_ours_says_where_its_traceback_is(error):
    code, stdout, said = ending(raising(error))
    assert (code, stdout, said.count("\n")) == (70, "", 1)
    found = re.fullmatch(
        rf"error: a fault in lofit-fast, please report it with (\S+): {type(error).__name__}: .+\n", said
    )
    kept = Path(found[1])
    text = kept.read_text()
    kept.unlink()
    assert text.startswith("Traceback (most recent call last)")
    assert f"raise error\n{type(error).__name__}" in text


def test_a_fault_whose_traceback_cannot_be_kept(monkeypatch):
    monkeypatch.setattr(command_module.tempfile, "NamedTemporaryFile", lambda *a, **o: raising(OSError("full"))())
    code, _, said = ending(raising(KeyError("x")))
    assert code == 70
    assert said.startswith("Traceback (most recent call last)")
    assert said.splitlines()[-1].endswith("with the traceback above: KeyError: 'x'")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_is_no_fault(error):
    code, _, said = ending(raising(error))
    assert (code, said.count("\n"), said.startswith("error: out of memory: ")) == (1, 1, True)


def test_a_message_is_one_line_of_a_length_that_one_reads(capsys):
    say_error("a\n\tb\x1b[2J" + "x" * 10**6 + "\ud83d é")
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 2200
    assert line.startswith(r"error: a b\x1b[2Jxxx")
    assert line.endswith(r"x\ud83d é (1000010 signs)")


def test_an_error_without_words_has_its_name():
    assert ending(raising(ValueError())) == (1, "", "error: ValueError\n")


@pytest.mark.parametrize("write", [lambda: print("x" * 10), lambda: out.print("x"), lambda: show({"a": 1}, True, "t")])
def test_output_that_nobody_reads_is_no_error(write, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as caught:
            app_of(write)([])
        monkeypatch.undo()
    assert caught.value.code == 141
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_output_on_a_full_disk_is_said(monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as caught:
            app_of(lambda: print("x"))([])
        monkeypatch.undo()
    assert caught.value.code == 1
    assert "No space left on device" in capfd.readouterr().err


LONG = ("--tune-epochs", "100000", "--select-epochs", "1", "--top", "2", "--dtype", "float32", "--device", "cpu")


@pytest.mark.slow
def test_ctrl_c_in_a_training(model, data, tmp_path):
    command = [sys.executable, "-m", "lofit_fast.cli", "train", "--model", model, "--data", data]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "run"), *LONG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(6000):
        if list((tmp_path / "run" / "tune").glob("checkpoint-*")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.rstrip().endswith("error: interrupted: the same command goes on where it was")
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("{plan} | head -c 0; exit ${{PIPESTATUS[0]}}", 141),
        ("{plan} --json | head -c 0; exit ${{PIPESTATUS[0]}}", 141),
        ("{plan} >&-", 0),
        ("{plan} >/dev/full", 1),
        ("{generate} <&-", 1),
    ],
)
def test_streams_that_are_closed(model, shell, code):
    start = f"{sys.executable} -m lofit_fast.cli"
    plan, generate = f"{start} plan --model {model} --tokens 8", f"{start} generate --model {model}"
    text = shell.format(plan=plan, generate=generate)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.stderr.count("error:") == (code == 1)
