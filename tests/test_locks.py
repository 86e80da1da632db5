"""One process at a time."""

import os
import socket
import subprocess
import sys
import threading
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


def test_one_that_waits_says_for_whom_and_goes_in_after_it(tmp_path, caplog):
    process = holder(tmp_path / ".lock")
    order = []

    def kill():
        order.append("killed")
        process.kill()

    timer = threading.Timer(0.3, kill)
    timer.start()
    with alone(tmp_path / ".lock", "fill it", wait=True):
        order.append("inside")
    process.communicate()
    assert order == ["killed", "inside"]
    assert caplog.messages == [f"waiting to fill it: process {process.pid} on host {socket.gethostname()} does so now"]


def test_one_that_need_not_wait_says_nothing(tmp_path, caplog):
    with alone(tmp_path / ".lock", "fill it", wait=True):
        pass
    assert caplog.messages == []
