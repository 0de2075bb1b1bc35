"""The command `jaxgpt serve`, as users start and stop it."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import urllib.request

import pytest
from serving import SECONDS, USER, make_model
from tiny_runs import single_device_env

import jaxgpt
from jaxgpt.cli import serve
from jaxgpt.settings import ConfigError

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "mine"
    jaxgpt.save(make_model(""), folder)
    return str(folder)


def test_a_run_is_served_until_the_signal(run):
    options = ["--port", "0", "--rows", "2", "--chunk", "16", "--template", "plain"]
    fast = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAXGPT_API_KEY": "secret"}
    with subprocess.Popen(
        [sys.executable, "-m", "jaxgpt", "serve", run, *options, "temperature=0", "tokens=5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=single_device_env() | fast,
    ) as process:  # fmt: skip
        line = process.stdout.readline()
        found = re.search(
            r"^serving mine on (http://127\.0\.0\.1:\d+) \(2 rows of 128 tokens\)", line
        )
        assert found, line + (process.stderr.read() if process.poll() else "")
        body = json.dumps({"messages": USER}).encode()
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
        request = urllib.request.Request(f"{found[1]}/v1/chat/completions", body, headers)
        answers = [json.load(urllib.request.urlopen(request, timeout=SECONDS)) for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert answers[0]["model"] == "mine"
    assert answers[0]["choices"] == answers[1]["choices"]  # temperature=0
    assert answers[0]["usage"]["completion_tokens"] <= 5
    assert re.search(r"POST /v1/chat/completions 200 \d", errors)
    assert "hello" not in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "give --api-key KEY"),
        (["--port", "99999"], "--port 99999 must be 0 to 65535"),
        (["--rowz", "3"], "there is no option --rowz. Did you mean --rows"),
        (["--adapter", "a"], "expected NAME=VALUE"),
        (["--adapter", "a=nowhere"], "nowhere"),
        (["--mesh", "tenser=2"], "Did you mean tensor"),
        (["temperatur=1"], "Did you mean sample.temperature"),
        (["--checkpoint", "bast"], "Did you mean 'best'"),
    ],
)
def test_what_cannot_be_served_is_refused_before_a_model_is_loaded(run, options, message):
    os.environ.pop("JAXGPT_API_KEY", None)
    with pytest.raises(ConfigError, match=re.escape(message)):
        serve.main([run, *options], "jaxgpt serve")
