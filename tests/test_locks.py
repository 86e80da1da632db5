"""One process at a time."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lofit_fast import locks
from lofit_fast.locks import alone

# takes the lock, says so, and waits to be killed
HOLDER = """
import sys, time, types
# the package around it is stood in for: it takes seconds to import
package = sys.modules["lofit_fast"] = types.ModuleType("lofit_fast")
package.__path__ = [sys.argv[2]]
from lofit_fast.locks import alone
with alone(sys.argv[1], "hold"):
    print("inside", flush=True)
    time.sleep(60)
"""


def holder(path):
    command = [sys.executable, "-c", HOLDER, str(path), str(Path(locks.__file__).parent)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "inside\n"
    return process


def test_the_second_is_refused_with_the_firsts_process_and_host(tmp_path):
    process = holder(tmp_path / ".lock")
    try:
        with (
            pytest.raises(BlockingIOError, match=f"cannot train: process {process.pid} on host {socket.gethostname()}"),
            alone(tmp_path / ".lock", "train"),
        ):
            pytest.fail("two were inside")
    finally:
        process.kill()
        process.communicate()


def test_a_killed_process_leaves_the_lock_free(tmp_path):
    process = holder(tmp_path / ".lock")
    process.kill()
    process.communicate()
    with alone(tmp_path / ".lock", "train"):
        assert str(os.getpid()) in (tmp_path / ".lock.owner.json").read_text()
    assert not (tmp_path / ".lock.owner.json").exists()


def test_one_thread_of_a_process_too(tmp_path):
    refused = pytest.raises(BlockingIOError, match=f"process {os.getpid()}")
    with alone(tmp_path / ".lock", "train"), refused, alone(tmp_path / ".lock", "train again"):
        pytest.fail("two were inside")
