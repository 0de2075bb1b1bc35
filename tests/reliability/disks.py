"""Disks that fill up, become read-only, or vanish while a run trains."""

import contextlib
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator

from jaxgpt.saved_arrays import list_steps
from jaxgpt.verification import is_usable, verify

from . import Commands, Outcome, shorten


def can_mount() -> bool:
    """Return whether this process may mount a file system in memory."""
    if os.name != "posix" or os.geteuid() != 0:
        return False
    try:
        with tempfile.TemporaryDirectory() as folder, small_disk(pathlib.Path(folder), 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kilobytes: int) -> Iterator[None]:
    """Mount a small file system in memory."""
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    subprocess.run(["mount", *options], check=True, capture_output=True)
    try:
        yield
    finally:
        for _ in range(2):  # `lose` may have mounted it over itself
            subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


SETTINGS = ("train.steps=40", "train.save_every=4", "train.eval_every=8", "train.sample_every=8")


def fill(commands: Commands, times: int) -> Outcome:
    """Train on disks of many sizes, too small from the first file to the last checkpoint."""
    failures, statuses = [], []
    for number in range(times):
        kilobytes = 40 + 160 * number if times < 4 else 40 + 1200 * number // times
        folder = commands.folder / "disk"
        folder.mkdir(exist_ok=True)
        action = ("continue", "stop")[number % 2]
        with small_disk(folder, kilobytes):
            small = Commands(commands.folder, folder)
            status, out = small.train("run", *SETTINGS, f"train.on_save_error={action}")
            statuses.append(status)
            failures += check(f"{kilobytes} kB, {action}", folder / "run", status, out)
    return Outcome("a disk that fills up", times, failures,
                   {"ended with an error": sum(map(bool, statuses))})  # fmt: skip


def lose(commands: Commands, how: str) -> Outcome:
    """Make the disk read-only, or take it away, while a run trains; give it back at the end.

    Args:
        how: "read-only", "vanished" or "full for a while".
    """
    folder = commands.folder / "disk"
    folder.mkdir(exist_ok=True)
    steps = 600
    failures = []
    with small_disk(folder, 8000):
        small = Commands(commands.folder, folder)
        settings = (f"train.steps={steps}", "train.save_every=20", "train.eval_every=60")
        process = small.start("train", *small.list_arguments("run", *settings))
        lines = []
        for line in process.stdout:
            lines.append(line)
            step = re.match(r"step +(\d+)/", line)
            if step and int(step[1]) == 100:
                _take_away(folder, how)
            if step and int(step[1]) == 400 and how == "full for a while":
                (folder / "ballast").unlink()
        process.wait()
        out = "".join(lines)
        if how == "vanished":
            wanted = process.returncode == 1 and "could not be saved" in out
        else:
            failures += check(how, folder / "run", process.returncode, out)
            wanted = (process.returncode == 0) == (how == "full for a while")
            newest = max(list_steps(str(folder / "run" / "checkpoints")), default=0)
            wanted &= newest == steps if process.returncode == 0 else newest >= 60
        if not wanted or "Traceback" in out:
            failures.append(f"{how}: {process.returncode}: {shorten(out)}")
    return Outcome(f"a disk that is {how}", 1, failures, {"exit status": process.returncode})


def _take_away(folder: pathlib.Path, how: str):
    if how == "read-only":
        # Over itself: a file system with files that are open for writing stays writable.
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    elif how == "vanished":
        subprocess.run(["umount", "-l", str(folder)], check=True)
    else:
        with open(folder / "ballast", "wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))


def check(what: str, run: pathlib.Path, status: int, out: str) -> list[str]:
    """Return what is wrong with a run whose disk was too small."""
    failures = []
    if "Traceback" in out:
        failures.append(f"{what}: a traceback: {shorten(out)}")
    saved = max(list_steps(str(run / "checkpoints")), default=0)
    if (run / "config.json").exists() and not is_usable(verify(str(run))):
        failures.append(f"{what}: a checkpoint is damaged")
    finished = f"step {saved}/{saved} " in out
    if status == 0 and not (saved and finished):
        failures.append(f"{what}: exit 0, and the last checkpoint is of step {saved}")
    if status and status not in (1, 2):
        failures.append(f"{what}: exit {status}: {shorten(out)}")
    if status and not any(word in out for word in ("No space left", "Read-only")):
        failures.append(f"{what}: no reason is given: {shorten(out)}")
    return failures
