"""What a run survives: kills, damage, full disks, other runs, readers, signals, other processes.

A small dose is in tests/test_reliability.py. A large one:

    python -m tests.reliability --kills 50 --flips 500 --minutes 60

prints a table in Markdown and JSON. Each scenario is a function that returns an `Outcome`.
"""

import multiprocessing
import os
import pathlib
import signal
import sys
from typing import Any, NamedTuple

SIZES = [
    *("data.tokenizer=bytes", "model.vocab=260", "model.context=16", "model.width=32"),
    *("model.layers=2", "model.heads=4", "model.kv_heads=2", "model.ffn=48", "train.batch=16"),
    *("optimizer.name=adamw", "optimizer.lr=1e-2", "optimizer.warmup=2", "train.sample_every=0"),
    *("train.log_every=1", "sample.tokens=4", "data.workers=1"),
]


class Outcome(NamedTuple):
    """What a scenario has found.

    Attributes:
        scenario: what was done.
        dose: how often.
        failures: a line for each time that something was lost, wrong or unclear.
        facts: counts and measurements, by name.
    """

    scenario: str
    dose: int
    failures: list[str]
    facts: dict[str, Any]


class Commands:
    """Starts `jaxgpt` as a user does, in processes of its own, on one small text.

    Args:
        folder: of the text, its tokens and the compiled programs.
        runs: of the run folders.
    """

    def __init__(self, folder: pathlib.Path, runs: pathlib.Path | None = None):
        from tiny_runs import write_text

        self.folder, self.runs = folder, runs or folder / "runs"
        self.text = write_text(folder / "text")

    def list_arguments(self, name: str, *settings: str) -> list[str]:
        """Return the arguments of `jaxgpt train` for a run."""
        places = [
            f"folder={self.runs}", f"name={name}", f"data.source={self.text}",
            f"data.cache={self.folder / 'tokens'}",
        ]  # fmt: skip
        return [*SIZES, *places, *settings]

    def start(self, command: str, *arguments: str, devices: int = 1) -> "Command":
        """Start a command."""
        from xla_flags import make_xla_flags

        environment = {"XLA_FLAGS": make_xla_flags(devices), "JAX_PLATFORMS": "cpu"}
        return Command([command, *arguments], environment, str(self.folder / "compiled"))

    def train(self, name: str, *settings: str, devices: int = 1) -> tuple[int, str]:
        """Train a run to its end; return the exit status and the output."""
        process = self.start("train", *self.list_arguments(name, *settings), devices=devices)
        out = process.stdout.read()
        return process.wait(), out


FORKS = multiprocessing.get_context("forkserver")  # processes that have imported jax
FORKS.set_forkserver_preload(
    [
        *("jaxgpt.trainer.loop", "jaxgpt.cli.train", "jaxgpt.cli.sample", "jaxgpt.console"),
        *("matplotlib.figure", "matplotlib.backends.backend_agg", "tensorboardX"),
    ]
)


class Command:
    """A `jaxgpt` command in a process of its own, forked from one that has imported jax.

    Args:
        arguments: after `jaxgpt`.
        environment: variables to set.
        compiled: folder of compiled programs.
        folder: to run in.
    """

    def __init__(
        self, arguments: list[str], environment: dict[str, str], compiled: str, folder: str = "."
    ):
        read, write = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(
            target=_run, args=(arguments, environment, compiled, folder, write), daemon=True
        )
        self._process.start()
        write.close()
        self.pid = self._process.pid
        self.stdout = os.fdopen(os.dup(read.fileno()), errors="replace")  # both kinds of output
        read.close()

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        return self._process.exitcode

    returncode = property(poll)

    def send_signal(self, number: int):
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for the end; return the exit status, as of `subprocess`."""
        self._process.join()
        return self._process.exitcode


def _run(arguments: list[str], environment: dict[str, str], compiled: str, folder: str, write):
    """Run a command in a forked process."""
    from jaxgpt import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    for number in (1, 2):
        os.dup2(write.fileno(), number)
    write.close()
    prepare_fork(environment, compiled, folder)
    sys.argv = ["jaxgpt", *arguments]
    cli.main()


def prepare_fork(environment: dict[str, str], compiled: str, folder: str):
    """Make a forked process one that was started in a folder with an environment."""
    import jax

    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, os.getcwd())
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # those before had a file
    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def shorten(text: str, lines: int = 3) -> str:
    """Return the last lines of an output, on one line."""
    return " / ".join(text.strip().splitlines()[-lines:])[:400]
