"""Runs tasks in a child process that may die: the parent never touches the GPU and always gets an answer."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.gpu.worker import MARK, NOW

ROOT = Path(__file__).parents[3]
# a task that says nothing new for so long hangs: the longest step, compiling a hook or a kernel, takes a third of it
SILENCE = 60.0


class Isolated:
    """A worker that is started when it is needed and again after it died.

    device: "cuda", or "cpu" for Triton's interpreter. command: what to start.
    """

    def __init__(
        self, device: str, command: Sequence[str] = (sys.executable, "-m", "benchmarks.speed.gpu.worker")
    ) -> None:
        self.device, self.command = device, command
        self.process: subprocess.Popen | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def run(self, task: dict[str, Any], seconds: float, silence: float = SILENCE) -> dict[str, Any]:
        """The worker's answer; {"error": ..., "at": ...} when it died, or hung.

        seconds: for all of it. silence: how long it may go without saying what it does now. at: what that was last,
        a peer's name or a case, None before the first.
        """
        task, until, at = task | {"device": self.device}, time.monotonic() + seconds, None
        process = self._started()
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            while True:
                patience = min(silence, until - time.monotonic())
                line = self._lines.get(timeout=max(0.0, patience))
                if line is None or not line.startswith(NOW):
                    break
                at = line.removeprefix(NOW).strip()
        except queue.Empty:
            self.close()
            late = f"no answer within {seconds:.0f} seconds" if patience < silence else f"silent for {silence:.0f} s"
            return {"error": late, "at": at}
        except OSError:
            line = None
        if line is None:
            # it has closed its output: it is dead, or about to be
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            self.close()
            return {"error": f"the process died with status {process.returncode}: {self._last_words()}", "at": at}
        result = json.loads(line.removeprefix(MARK))
        if "broken" in result or "broken_by" in result:
            if "error" in result:
                result.setdefault("at", at)
            self.close()
        return result

    def close(self) -> None:
        """Ends the worker."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            # a task that a dead worker has not taken is written out here, to nobody
            with contextlib.suppress(OSError):
                process.stdin.close()

    def _started(self) -> subprocess.Popen:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.close()
        paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        # one compiler thread: a pool of them would outlive a worker that is killed
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TRITON_INTERPRET": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        if self.device == "cuda":
            del environment["TRITON_INTERPRET"]
        self._errors.truncate(0)
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._lines = queue.Queue()
        threading.Thread(target=_read, args=(self.process.stdout, self._lines), daemon=True).start()
        return self.process

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip("\0 \n") for line in self._errors.read().splitlines()]
        return " | ".join([line for line in lines if line][-3:])[:600]


def _read(stream: Any, lines: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            if line.startswith((MARK, NOW)):
                lines.put(line)
    lines.put(None)
