"""One run, one folder: who holds the lock is refused to others, and the dead do not hold it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import closing

import pytest
from tiny_runs import run_config

from jaxgpt.config import override
from jaxgpt.settings import ConfigError
from jaxgpt.trainer import lock as lock_module
from jaxgpt.trainer import loop, train
from jaxgpt.trainer import run as run_module
from jaxgpt.trainer.lock import NAME, RunLock, describe_process, read_start_time

HOLD = """
import sys, time
from jaxgpt.trainer.lock import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def write_holder(folder, **changes):
    """Write the lock of a process that does not hold the system's lock."""
    (folder / NAME).write_text(json.dumps(describe_process() | changes))


def refuse(folder, monkeypatch=None) -> str:
    with pytest.raises(ConfigError) as error:
        RunLock(str(folder))
    return str(error.value)


def test_a_second_run_is_refused_with_who_holds_the_folder(holder, tmp_path):
    message = refuse(tmp_path)
    assert re.search(
        rf"another run trains in {tmp_path}: process {holder.pid} on .+ since 20", message
    )
    assert f"delete {tmp_path}/{NAME}" in message


def test_the_lock_of_a_killed_process_is_taken(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / NAME).exists()
    with closing(RunLock(str(tmp_path))) as lock:
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        assert lock.is_held()
    assert os.listdir(tmp_path) == []


def test_two_runs_of_one_process_exclude_each_other(tmp_path):
    with closing(RunLock(str(tmp_path))):
        assert f"process {os.getpid()} on" in refuse(tmp_path)
    RunLock(str(tmp_path)).close()


FORK = """
import os, sys
from jaxgpt.trainer.lock import RunLock
lock = RunLock(sys.argv[1])
if not os.fork():  # a child that outlives its parent's lock
    sys.stdin.read()
    os._exit(0)
lock.close()
RunLock(sys.argv[1]).close()
print("taken again", flush=True)
"""


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path)], input="", capture_output=True, text=True
    )
    assert process.stdout == "taken again\n", process.stderr


def test_a_folder_that_a_lock_has_made_is_removed_if_it_stays_empty(tmp_path):
    RunLock(str(tmp_path / "a" / "run")).close()
    assert os.listdir(tmp_path / "a") == []


def test_a_lock_that_was_taken_by_force_is_noticed(tmp_path):
    with closing(RunLock(str(tmp_path))) as first:
        os.remove(tmp_path / NAME)
        assert first.is_held()  # nobody has taken it yet
        with closing(RunLock(str(tmp_path))) as second:
            assert second.is_held()
            assert not first.is_held()
            first.close()  # leaves the other one's file alone
            assert second.is_held()
            assert (tmp_path / NAME).exists()


# --- file systems without locks, and other machines ---


@pytest.fixture
def no_system_locks(monkeypatch):
    monkeypatch.setattr(lock_module, "_lock", lambda fd, path: False)


def test_without_system_locks_a_live_process_holds_the_folder(tmp_path, no_system_locks):
    write_holder(tmp_path)
    assert f"process {os.getpid()} on" in refuse(tmp_path)


def test_a_process_id_that_was_given_again_holds_nothing(tmp_path, no_system_locks):
    write_holder(tmp_path, started="1")
    RunLock(str(tmp_path)).close()


def test_another_machine_without_a_sign_of_life_loses_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.02)
    write_holder(tmp_path, boot="another", host="far", pid=os.getpid())
    lines = []
    RunLock(str(tmp_path), lines.append).close()
    assert "sign of life of process" in lines[0]
    assert "on far" in lines[0]


def test_another_machine_with_a_sign_of_life_keeps_the_folder(tmp_path, monkeypatch):
    write_holder(tmp_path, boot="another", host="far", pid=1)
    beats = iter(range(100))
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 60)
    monkeypatch.setattr(lock_module.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(lock_module, "_read_beat", lambda path: next(beats))
    assert "process 1 on far" in refuse(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["host"] == "far"


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.001)
    beaten = threading.Event()
    monkeypatch.setattr(lock_module.os, "utime", lambda fd: beaten.set())
    with closing(RunLock(str(tmp_path))):
        assert beaten.wait(20)


def test_the_start_of_a_process_tells_it_from_others():
    assert read_start_time(os.getpid()) == describe_process()["started"] != ""
    assert read_start_time(2**22 + 1) == ""


# --- runs ---


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
    settings = ["name=run", "train.steps=4", "train.eval_every=2", "train.save_every=2"]
    return run_config(tmp_path, *settings)


def test_a_run_holds_its_folder_and_leaves_no_lock(cfg, monkeypatch):
    messages = []

    def start_another(run):
        with pytest.raises(ConfigError) as error:
            train(cfg, is_quiet=True)
        messages.append(str(error.value))

    monkeypatch.setattr(loop, "show_untrained", start_another)
    assert train(cfg, is_quiet=True).step == 4
    assert f"another run trains in {cfg.run_folder}: process {os.getpid()}" in messages[0]
    assert NAME not in os.listdir(cfg.run_folder)


def test_a_run_that_is_refused_releases_its_folder(cfg):
    with pytest.raises(ConfigError):
        train(override(cfg, ["data.source=/nowhere"]), is_quiet=True)
    assert not os.path.exists(cfg.run_folder)


def test_a_run_whose_folder_was_taken_ends_without_saving(cfg, monkeypatch):
    taken = []

    def take(run):
        if not taken:
            os.remove(os.path.join(cfg.run_folder, NAME))
            taken.append(RunLock(cfg.run_folder))

    monkeypatch.setattr(loop, "show_untrained", take)
    with pytest.raises(loop.LostLockError, match=r"another run has taken .* ends at step 2"):
        train(cfg, is_quiet=True)
    with closing(taken[0]):
        assert os.listdir(os.path.join(cfg.run_folder, "checkpoints")) == []
        assert taken[0].is_held()
