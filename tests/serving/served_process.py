"""`lofit-fast serve` as a process of its own."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def served(*options):
    """A scope with (process, port) of `lofit-fast serve` on a free port."""
    command = [sys.executable, "-m", "lofit_fast.cli", "serve", *map(str, options), "--port", "0", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line, process.communicate(timeout=60)[1][-2000:]
        yield process, int(json.loads(line)["url"].rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()
