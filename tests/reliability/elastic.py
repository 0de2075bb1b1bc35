"""Runs of several processes: killed on four, continued on two and one, all arrays checked."""

import pathlib
import signal
import socket

from jaxgpt.saved_arrays import list_steps, read_progress
from jaxgpt.verification import is_usable, verify

from . import Commands, Outcome, shorten

MESH = ("mesh.fsdp=2", "train.save_every=5", "train.eval_every=20")


def find_free_address() -> str:
    """Return a free host:port on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def train(
    commands: Commands, processes: int, *settings: str, kill_at: int = 0
) -> list[tuple[int, str]]:
    """Train with several processes of one device; kill the last one after a step, if asked to.

    Returns:
        The exit status and the output of each.
    """
    extra: list[list[str]] = [[]]
    if processes > 1:
        address = find_free_address()
        where = ["--coordinator", address, "--processes", str(processes), "--timeout", "60"]
        extra = [[*where, "--process", str(i)] for i in range(processes)]
    arguments = commands.list_arguments("elastic", *MESH, *settings)
    started = [commands.start("train", *arguments, *more, devices=1 if processes > 1 else 2)
               for more in extra]  # fmt: skip
    lines = []
    for line in started[0].stdout:
        lines.append(line)
        if kill_at and line.startswith("step") and f"{kill_at}/" in line.split()[1]:
            started[-1].send_signal(signal.SIGKILL)
    outputs = ["".join(lines)] + [process.stdout.read() for process in started[1:]]
    for process in started:
        process.wait()
    return [(p.returncode, out) for p, out in zip(started, outputs, strict=True)]


def shrink(commands: Commands) -> Outcome:
    """Kill a run on four processes, then on two, and end it with one of two devices."""
    failures = []
    folder = pathlib.Path(commands.runs / "elastic")
    for processes, kill_at in ((4, 18), (2, 38), (1, 0)):
        before = max(list_steps(str(folder / "checkpoints")), default=0)
        settings = [f"train.steps={60}", f"mesh.data={max(processes // 2, 1)}", "resume=force"]
        results = train(commands, processes, *settings, kill_at=kill_at)
        first = results[0]
        if before and f"(resuming from step {before})" not in first[1]:
            failures.append(f"{processes} processes: not from {before}: {shorten(first[1])}")
        if bool(kill_at) == (first[0] == 0):
            failures.append(f"{processes} processes: {first[0]}: {shorten(first[1])}")
        if not is_usable(verify(str(folder))):
            failures.append(f"after {processes} processes it is damaged")
    newest = max(list_steps(str(folder / "checkpoints")), default=0)
    records = read_progress(str(folder / "checkpoints" / str(newest)))[1] or {}
    return Outcome("killed on 4 processes, continued on 2 and 1", 1, failures,
                   {"last step": newest, "arrays with checksums": len(records)})  # fmt: skip
