"""What a user sees who types a command: text, exit codes, and no traceback for a typo."""

import os
import pathlib
import subprocess
import sys

import pytest
from tiny_runs import alone, write_text

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = """
from jaxgpt.config import *

config = Config(
    name="tiny",
    folder={folder!r},
    model=ModelConfig(vocab=260, context=16, width=32, layers=2, heads=2, ffn=48),
    data=DataConfig(source={text!r}, tokenizer="bytes", cache={cache!r}),
    optimizer=OptimizerConfig(lr=1e-2, warmup=2),
    train=TrainConfig(steps=20, batch=8, eval_every=10, save_every=10, sample_every=0),
    sample=SampleConfig(prompt="the ", tokens=8),
)
"""


def call(script, *arguments, stdin=""):
    """Runs a script of ours from the repository's root, on one device."""
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, cwd=ROOT, env=alone()
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    text = write_text(folder / "text")
    where = dict(folder=str(folder / "runs"), text=str(text), cache=str(folder / "tokens"))
    (folder / "tiny.py").write_text(CONFIG.format(**where))
    return folder


@pytest.fixture(scope="module")
def trained(place):
    return call("train.py", "--config", place / "tiny.py")


@pytest.fixture(scope="module")
def run(place, trained):
    assert trained.returncode == 0, trained.stderr
    return place / "runs" / "tiny"


def assert_refused(done, text):
    """One clear line on stderr, exit code 2."""
    assert done.returncode == 2
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


# --- train.py ---


def test_training_ends_well_and_writes_no_warning(trained):
    assert trained.returncode == 0
    assert trained.stderr == ""


def test_training_tells_where_it_stands_and_how_to_sample(trained, place):
    assert "step 20/20  loss " in trained.stdout
    assert trained.stdout.endswith(f"jaxgpt sample {place / 'runs' / 'tiny'}\n")


def test_the_same_command_again_has_nothing_left_to_do(run, place):
    again = call("train.py", "--config", place / "tiny.py")
    assert again.returncode == 0
    assert "This run is complete" in again.stdout


def test_a_misspelled_setting_is_one_line_with_the_right_spelling(place):
    done = call("train.py", "--config", place / "tiny.py", "model.widht=64")
    assert_refused(done, "train.py: there is no setting 'model.widht'. Did you mean model.width?")


def test_a_value_of_the_wrong_type_is_one_line(place):
    done = call("train.py", "--config", place / "tiny.py", "model.width=wide")
    assert_refused(done, "train.py: model.width='wide' is not a whole number")


def test_a_config_that_is_not_there_is_one_line():
    assert_refused(call("train.py", "--config", "gpt_mimi"), "Did you mean gpt_mini?")


def test_other_settings_for_an_old_run_are_refused(run, place):
    done = call("train.py", "--config", place / "tiny.py", "model.width=64")
    assert done.returncode == 2
    assert "model.width: 32 -> 64" in done.stderr
    assert "Traceback" not in done.stderr


def test_divergence_is_one_line_and_another_exit_code(place):
    wild = ["name=wild", "optimizer.lr=1e30", "optimizer.clip=0"]
    done = call("train.py", "--config", place / "tiny.py", *wild)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "lower optimizer.lr" in done.stderr


def test_help_lists_every_setting_with_its_choices():
    done = call("train.py", "--help")
    assert done.returncode == 0
    for text in ("model.width=384", "optimizer.lr=0.001", "adamw | ", "--config"):
        assert text in done.stdout


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_reader_that_leaves_is_no_error_to_look_at(script):
    process = subprocess.Popen(
        [sys.executable, script, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=alone(),
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_ctrl_c_before_training_begins_is_one_line(tmp_path):
    config = tmp_path / "slow.py"
    config.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = call("train.py", "--config", config)
    assert done.returncode == 130
    assert done.stderr.strip() == "train.py: stopped by Ctrl-C."


# --- sample.py ---


def test_a_sample_is_the_prompt_and_its_continuation(run):
    done = call("sample.py", run)
    assert done.returncode == 0
    assert done.stdout.startswith("the ")
    assert len(done.stdout.encode(errors="surrogateescape")) > len("the \n")


def test_what_is_no_text_goes_to_stderr(run):
    lines = call("sample.py", run).stderr.splitlines()
    assert lines[0] == f"[{run}, step 20, seed 0]"
    assert len(lines) == 2
    assert "8 tokens in " in lines[1]


def test_several_prompts_are_answered_in_their_order(run):
    done = call("sample.py", run, "--prompt", "a dog", "--prompt", "the cat", "temperature=0")
    first, second = done.stdout.splitlines()
    assert first.startswith("a dog")
    assert second.startswith("the cat")


def test_prompts_come_from_a_file_and_from_standard_input(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\nthe cat\n")
    greedy = "temperature=0"
    from_file = call("sample.py", run, "--file", tmp_path / "prompts.txt", greedy)
    from_stdin = call("sample.py", run, "--file", "-", greedy, stdin="a dog\nthe cat\n")
    assert from_file.returncode == from_stdin.returncode == 0
    assert from_file.stdout == from_stdin.stdout
    assert len(from_file.stdout.splitlines()) == 2


def test_the_latest_checkpoint_may_be_asked_for(run):
    assert call("sample.py", run, "--checkpoint", "latest").returncode == 0


def test_a_folder_that_is_no_run_is_one_line(place):
    assert_refused(call("sample.py", place), "is not a run")


def test_a_prompt_file_that_is_not_there_is_one_line(run):
    assert_refused(call("sample.py", run, "--file", "nix.txt"), "--file nix.txt: No such file")


def test_a_misspelled_setting_of_a_sample_is_one_line(run):
    done = call("sample.py", run, "temprature=0.5")
    assert_refused(done, "Did you mean sample.temperature?")


def test_an_unknown_checkpoint_is_one_line(run):
    assert_refused(call("sample.py", run, "--checkpoint", "first"), "Known: best, latest")


def test_sampling_without_a_run_shows_the_help():
    done = call("sample.py")
    assert done.returncode == 2
    assert "sample.temperature=0.8" in done.stdout


def test_the_scripts_stay_short():
    for name in ("train.py", "sample.py"):
        assert len((ROOT / name).read_text().splitlines()) < 60, name


def test_the_environment_is_as_a_users():
    assert "XLA_FLAGS" in os.environ
    assert "XLA_FLAGS" not in alone()
