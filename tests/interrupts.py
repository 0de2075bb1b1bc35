"""Send Ctrl-C to commands at every moment of their start: no traceback, and status 130.

    python -m tests.interrupts                       train.py and sample.py, every 0.05 s to 6 s
    python -m tests.interrupts --every 0.2 --until 20

sample.py needs a run: train.py makes a small one first. Moments at which Python itself still
starts, before a line of the command has run, are shown as such; a command cannot change them.
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
PYTHON_START = "init_import_site"  # in Python's message for Ctrl-C before it runs a script
SETTINGS = (
    *("model.vocab=300", "model.width=32", "model.layers=1", "model.heads=2", "model.context=32"),
    *("data.tokenizer=bytes", "train.batch=4", "train.eval_batches=1"),
)


def allow_interrupt():
    """Let SIGINT reach a process though a shell that started this one with `&` ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(command: list[str], seconds: float) -> tuple[int, str]:
    """Run a command, send SIGINT after `seconds`, and return its status and its output."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=allow_interrupt,
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    return process.returncode, output


def judge(status: int, output: str) -> str:
    """Return "" if an interrupted command ended as it should, or what was wrong."""
    if PYTHON_START in output or (status == -signal.SIGINT and not output):
        return "Python was starting"
    if "Traceback" in output or "Exception ignored" in output:
        return "traceback"
    if status == 0:  # training saved and ended, or the command was complete
        return ""
    return "" if status == 130 else f"status {status}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=float, default=0.05, help="seconds between the moments")
    parser.add_argument("--start", type=float, default=0.0, help="seconds before the first moment")
    parser.add_argument("--until", type=float, default=6.0, help="seconds of the last moment")
    args = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        text = os.path.join(folder, "text.txt")
        pathlib.Path(text).write_text("the quick brown fox jumps over the lazy dog\n" * 2000)
        paths = (f"folder={folder}", f"data.source={text}", f"data.cache={folder}/cache")
        train = ["train.py", *SETTINGS, *paths]
        subprocess.run([sys.executable, *train, "name=done", "train.steps=2"], cwd=ROOT, check=True)
        count = round((args.until - args.start) / args.every)
        moments = [args.start + args.every * i for i in range(1, count + 1)]
        for i, seconds in enumerate(moments):
            commands = (
                [*train, f"name=run{i}", "train.steps=1000000"],
                ["sample.py", os.path.join(folder, "done"), "tokens=200"],
            )
            for command in commands:
                status, output = interrupt(command, seconds)
                wrong = judge(status, output)
                print(f"{seconds:6.2f} s  {command[0]:10} status {status:4}  {wrong}", flush=True)
                if wrong and wrong != "Python was starting":
                    failures += 1
                    print(output[-1500:], flush=True)
    print(f"{failures} of {2 * len(moments)} ended wrongly")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
