"""Kills at any time, signals, and two runs in one folder: all by processes, as users start them."""

import os
import random
import re
import shutil
import signal
import threading
import time

from jaxgpt.saved_arrays import list_steps, read_progress
from jaxgpt.trainer.logging import read_metrics
from jaxgpt.verification import is_usable, verify

from . import Commands, Outcome, shorten

SAVE_EVERY = 2
SETTINGS = (f"train.save_every={SAVE_EVERY}", "train.eval_every=6", "train.keep=2")


def follow(process, at_step: int, delay: float, number: int) -> list[str]:
    """Read the output of a run, and send it a signal a while after a step; return its lines."""
    lines, is_sent = [], False

    def send():
        if process.poll() is None:
            process.send_signal(number)

    for line in process.stdout:
        lines.append(line)
        found = re.match(r"step +(\d+)/", line)
        if found and int(found[1]) >= at_step and not is_sent:
            is_sent = True
            threading.Timer(delay, send).start()
    process.wait()
    return lines


def make_reference(commands: Commands, steps: int) -> tuple[str, dict[int, dict]]:
    """Train a run that is never stopped; return its folder, and every step's checksums."""
    status, out = commands.train(
        "reference", *SETTINGS, f"train.steps={steps}", "train.save_every=1", "train.keep=100000"
    )
    assert status == 0, out
    folder = str(commands.runs / "reference")
    return folder, {n: read_records(folder, n) for n in list_steps(f"{folder}/checkpoints")}


def read_records(folder: str, step: int) -> dict:
    """Return the checksums of a checkpoint's arrays."""
    records = read_progress(f"{folder}/checkpoints/{step}")[1]
    assert records
    return records


def kill(commands: Commands, times: int, steps: int = 200, seed: int = 0) -> Outcome:
    """Kill a run at random moments, many of them within a write, and continue it each time.

    Whatever is in its folder then must be whole, equal to the bits of a run that was never killed,
    and no older than the promise: `save_every` steps, and those made while a write was under way.
    """
    dice, failures, lost = random.Random(seed), [], []
    unfinished = 0
    reference = make_reference(commands, steps)[1]
    name = 0
    done = 0
    while done < times:
        name += 1
        run = str(commands.runs / f"killed{name}")
        settings = (*SETTINGS, f"train.steps={steps}")
        while done < times:
            newest = max(list_steps(f"{run}/checkpoints"), default=0)
            if newest + 30 > steps:
                break
            process = commands.start("train", *commands.list_arguments(f"killed{name}", *settings))
            lines = follow(process, newest + dice.randint(1, 12), dice.random() * 0.3,
                           signal.SIGKILL)  # fmt: skip
            if process.returncode != -signal.SIGKILL:
                failures.append(f"ended with {process.returncode}: {shorten(''.join(lines))}")
                if len(failures) > 5:
                    return Outcome("kill -9", done, failures, {})
                continue
            done += 1
            unfinished += any(
                ".orbax-checkpoint-tmp" in x for x in os.listdir(f"{run}/checkpoints")
            )
            found, last = check_run(run, reference, lines)
            failures += found
            lost.append(last)
        status, out = commands.train(f"killed{name}", *settings)
        if status or read_records(run, steps) != reference[steps]:
            failures.append(f"continued to {status}: {shorten(out)}")
        shutil.rmtree(run, ignore_errors=True)
    return Outcome(
        "kill -9", done, failures,
        {"within a write": unfinished, "most steps lost": max(lost, default=0),
         "train.save_every": SAVE_EVERY},
    )  # fmt: skip


def check_run(run: str, reference: dict[int, dict], lines: list[str]) -> tuple[list[str], int]:
    """Compare a killed run with one that was not; return what is wrong, and the steps it lost."""
    failures = []
    if not is_usable(verify(run)):
        failures.append(f"{run} is damaged")
    steps = list_steps(f"{run}/checkpoints")
    failures += [
        f"step {n} of {run} has other bits" for n in steps if read_records(run, n) != reference[n]
    ]
    last = max((r["step"] for r in read_metrics(run) if r["kind"] == "train"), default=0)
    return failures, last - max(steps, default=0)


def stop(commands: Commands, times: int, steps: int = 200, seed: int = 1) -> Outcome:
    """Send SIGTERM, SIGINT or SIGHUP at random moments: the state of then is saved, the exit 0."""
    dice, failures = random.Random(seed), []
    folder, reference = str(commands.runs / "reference"), {}
    if not os.path.isdir(folder):
        make_reference(commands, steps)
    for done in range(times):
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[done % 3]
        run = str(commands.runs / "stopped")
        newest = max(list_steps(f"{run}/checkpoints"), default=0)
        if newest + 60 > steps:
            shutil.rmtree(run)
            newest = 0
        process = commands.start(
            "train", *commands.list_arguments("stopped", *SETTINGS, f"train.steps={steps}")
        )
        lines = follow(process, newest + dice.randint(1, 20), dice.random() * 0.2, number)
        saved = max(list_steps(f"{run}/checkpoints"), default=0)
        last = max((r["step"] for r in read_metrics(run) if r["kind"] == "train"), default=0)
        reference = read_records(folder, saved) if saved else {}
        if process.returncode or not any("Stopped by SIG" in line for line in lines):
            failures.append(f"{number.name}: {process.returncode}: {shorten(''.join(lines))}")
        elif saved != last or read_records(run, saved) != reference:
            failures.append(f"{number.name}: step {saved} is saved, {last} was made")
    return Outcome("SIGTERM, SIGINT, SIGHUP", times, failures, {})


def start_twice(commands: Commands, times: int, steps: int = 3000) -> Outcome:
    """Start a second run in the folder of one that trains; then kill that one, and start again."""
    failures, seconds = [], []
    for number in range(times):
        name = f"twice{number}"
        arguments = commands.list_arguments(name, *SETTINGS, f"train.steps={steps}")
        first = commands.start("train", *arguments)
        for line in first.stdout:
            if line.startswith("step "):
                break
        reader = threading.Thread(target=first.stdout.read, daemon=True)
        reader.start()
        begin = time.monotonic()
        status, out = commands.train(name, *SETTINGS, f"train.steps={steps}")
        seconds.append(time.monotonic() - begin)
        if status != 2 or f"process {first.pid} on" not in out or "Traceback" in out:
            failures.append(f"the second run ended with {status}: {shorten(out)}")
        if first.poll() is not None:
            failures.append(f"the first run ended with {first.returncode}")
        first.send_signal(signal.SIGKILL)
        first.wait()
        third = commands.start("train", *arguments)
        lines = follow(third, 1, 0.0, signal.SIGTERM)
        if third.returncode:
            failures.append(f"after a kill: {third.returncode}: {shorten(''.join(lines))}")
        if not is_usable(verify(str(commands.runs / name))):
            failures.append("the folder is damaged")
        shutil.rmtree(commands.runs / name)
    return Outcome("two runs in one folder", times, failures,
                   {"seconds until refused": round(max(seconds, default=0), 1)})  # fmt: skip
