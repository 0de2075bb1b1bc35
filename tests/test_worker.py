"""Processes of a benchmark end with the one that started them."""

import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent

SIDE = """
import os, sys, time
sys.path.insert(0, {root!r})
from benchmarks import worker
worker.end_with_parent()
print(os.getpid(), flush=True)
time.sleep(600)  # a contestant that runs, and does not read its pipe
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
time.sleep(600)
"""


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"  # ended, and not yet waited for


def test_a_killed_benchmark_leaves_no_process_behind():
    side = SIDE.format(root=str(ROOT))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, side], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    assert is_alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(child)
    parent.stdout.close()
