"""What a mistyped command line meant, said without importing jax."""

import os
import pathlib
import subprocess
import sys

import pytest
from tiny_runs import single_device_env

ROOT = pathlib.Path(__file__).parent.parent
RUN = ROOT / "tests" / "data" / "old_run"


def run_command(*arguments, cwd=ROOT):
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('jax' in sys.modules))\n"
        "from jaxgpt import cli\ncli.main()"
    )
    env = single_device_env() | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=env,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "gpt_mini"], "write jaxgpt train --config gpt_mini."),
        (["train", "configs/gpt_mini.py"], "--config configs/gpt_mini.py."),
        (["train", RUN], "is a run"),
        (["train", "docs"], "write data.source=docs."),
        (["train", "--model.width", "512"], "as model.width=512."),
        (["train", "--steps", "10"], "as train.steps=10."),
        (["train", "--seed", "10"], "as seed=10 or sample.seed=10."),
        (["train", "--steps=10"], "Did you mean train.steps?"),
        (["train", "--confg", "x"], "Did you mean --config?"),
        (["train", "--promt", "x"], "Did you mean sample.prompt=VALUE?"),
        (["sample", RUN, "--promt", "x"], "Did you mean --prompt?"),
        (["train", "data.tokenizer=gpt2"], "data.tokenizer='gpt2' is no file or folder here"),
        (["train", "data.source=https://a.b/c.txt"], "download it first (curl -LO https://a.b"),
        (["train", "data.source=0.5 * x + s3://a/b"], "'s3://a/b' is an address"),
        (["train", "optimizer.name=adm"], "Did you mean 'adam'?"),
        (["train", "optimizer.name=adamW"], "Did you mean 'adamw'?"),
        (["train", "model.mixers=atention"], "Did you mean 'attention'?"),
        (["train", "--config", "gpt_mni"], "Did you mean gpt_mini"),
        (["sample", RUN, "def main("], "--prompt 'def main('"),
        (["sample", RUN, "x = 1"], "--prompt 'x = 1'"),
        (["sample", RUN, "temp=0.5"], "Did you mean sample.temperature?"),
        (["sample", RUN, "--temperature", "0.5"], "as temperature=0.5."),
        (["sample", RUN, "--checkpoint", "latst"], "Did you mean 'latest'?"),
        (["sample", RUN, "--interactive", "--prompt", "x"], "--interactive reads prompts itself"),
        (["sample", "shakespeare"], "`jaxgpt train --config shakespeare` makes a run"),
        (["sample", ROOT / "tests" / "data"], f"Did you mean {RUN}?"),
        (["evaluate", RUN, "model.width=3"], "model.width belongs to the run"),
        (["evaluate", RUN, "data.source=a", "data.test=b"], "are two texts"),
        (["evaluate", RUN, "data.source=https://x"], "is an address"),
    ],
)
def test_a_wrong_command_says_what_was_meant(arguments, text):
    result = run_command(*arguments)
    assert text in result.stderr
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert len(result.stderr) < 600
    assert result.stdout == "False\n"  # jax is not imported


def test_a_run_is_suggested_by_its_name(tmp_path):
    os.makedirs(tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "mine" / "config.json").write_text("{}")
    assert "Did you mean runs/mine?" in run_command("sample", "mine", cwd=tmp_path).stderr


def test_names_are_not_checked_early_if_plugins_may_add_them(tmp_path):
    (tmp_path / "mine.py").write_text("raise RuntimeError('imported')")
    result = run_command("train", "optimizer.name=mine", f"plugins={tmp_path}/mine.py")
    assert "imported" in result.stderr
