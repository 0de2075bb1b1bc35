"""Ctrl-C at moments of a command's start: status 130, and no traceback. See also interrupts.py.

The moments are those at which a module has been imported, which Python reports on request, so that
they do not depend on the speed of the machine.
"""

import pathlib
import signal
import subprocess
import sys

import pytest

from jaxgpt import interrupts

ROOT = pathlib.Path(__file__).parent.parent


def interrupt_after(command, module) -> tuple[int, str]:
    """Start Python with a command, send SIGINT once it has imported a module; (status, output)."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen = False
    for line in process.stderr:
        if line.split("|")[-1].strip() == module:
            seen = True
            break
    process.send_signal(signal.SIGINT)
    output = process.stderr.read()
    assert seen, f"{module} is not imported by {command}"
    lines = [line for line in output.splitlines() if not line.startswith("import time:")]
    return process.wait(60), "\n".join(lines)


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (["train.py"], "jaxgpt.interrupts"),
        (["train.py"], "numpy"),
        (["train.py"], "jax._src.core"),
        (["-m", "jaxgpt", "train"], "jaxgpt.settings"),
        (["sample.py", "none"], "jaxgpt.settings"),
    ],
    ids=lambda x: x if isinstance(x, str) else x[0],
)
def test_ctrl_c_during_imports_ends_without_a_traceback(command, module):
    status, output = interrupt_after(command, module)
    assert status == 130, output
    assert "Traceback" not in output
    assert "Exception ignored" not in output
    assert not output or output.strip().endswith("stopped by Ctrl-C.")


def test_a_handler_of_the_caller_stays():
    ours = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts.end_process_at_once()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        interrupts.raise_keyboard_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupts.end_process_at_once()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        interrupts.raise_keyboard_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, ours)
