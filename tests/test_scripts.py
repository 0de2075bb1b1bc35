"""The scripts as a user sees them: output, exit codes, and no traceback for a typo."""

import pathlib
import subprocess
import sys

import pytest
from tiny_runs import single_device_env, write_text

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


def run_script(script, *arguments, stdin=""):
    """Run a script from the root of the repository, on one device."""
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, cwd=ROOT, env=single_device_env()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    text = write_text(folder / "text")
    paths = dict(folder=str(folder / "runs"), text=str(text), cache=str(folder / "tokens"))
    (folder / "tiny.py").write_text(CONFIG.format(**paths))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return run_script("train.py", "--config", folder / "tiny.py")


@pytest.fixture(scope="module")
def run(folder, trained):
    assert trained.returncode == 0, trained.stderr
    return folder / "runs" / "tiny"


def assert_rejected(result, text):
    """Assert one line on stderr and exit code 2."""
    assert result.returncode == 2
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


# --- train.py ---


def test_training_succeeds_without_warnings(trained):
    assert trained.returncode == 0
    assert trained.stderr == ""


def test_training_prints_its_progress_and_the_sampling_command(trained, folder):
    assert "step 20/20  loss " in trained.stdout
    assert trained.stdout.endswith(f"jaxgpt sample {folder / 'runs' / 'tiny'}\n")


def test_the_same_command_has_nothing_to_do_after_a_complete_run(run, folder):
    second = run_script("train.py", "--config", folder / "tiny.py")
    assert second.returncode == 0
    assert "This run is complete" in second.stdout


def test_a_misspelled_setting_is_one_line_with_the_right_spelling(folder):
    result = run_script("train.py", "--config", folder / "tiny.py", "model.widht=64")
    assert_rejected(
        result, "train.py: there is no setting 'model.widht'. Did you mean model.width?"
    )


def test_a_value_of_the_wrong_type_is_one_line(folder):
    result = run_script("train.py", "--config", folder / "tiny.py", "model.width=wide")
    assert_rejected(result, "train.py: model.width='wide' is not a whole number")


def test_a_missing_config_file_is_one_line():
    assert_rejected(run_script("train.py", "--config", "gpt_mimi"), "Did you mean gpt_mini")


def test_other_settings_for_an_existing_run_are_rejected(run, folder):
    result = run_script("train.py", "--config", folder / "tiny.py", "model.width=64")
    assert result.returncode == 2
    assert "model.width: 32 -> 64" in result.stderr
    assert "Traceback" not in result.stderr


def test_divergence_is_one_line_and_exit_code_1(folder):
    wild = ["name=wild", "optimizer.lr=1e30", "optimizer.clip=0"]
    result = run_script("train.py", "--config", folder / "tiny.py", *wild)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "lower optimizer.lr" in result.stderr


def test_help_lists_every_setting_with_its_choices():
    result = run_script("train.py", "--help")
    assert result.returncode == 0
    for text in ("model.width=384", "optimizer.lr=0.001", "adamw | ", "--config"):
        assert text in result.stdout


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_closed_output_pipe_prints_no_error(script):
    process = subprocess.Popen(
        [sys.executable, script, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=single_device_env(),
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 1


def test_ctrl_c_before_training_is_one_line(tmp_path):
    config = tmp_path / "slow.py"
    config.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    result = run_script("train.py", "--config", config)
    assert result.returncode == 130
    assert result.stderr.strip() == "train.py: stopped by Ctrl-C."


# --- sample.py ---


def test_a_sample_is_the_prompt_and_its_continuation(run):
    result = run_script("sample.py", run)
    assert result.returncode == 0
    assert result.stdout.startswith("the ")
    assert len(result.stdout.encode(errors="surrogateescape")) > len("the \n")


def test_everything_but_the_text_goes_to_stderr(run):
    lines = run_script("sample.py", run).stderr.splitlines()
    assert lines[0] == f"[{run}, step 20, seed 0]"
    assert len(lines) == 2
    assert "8 tokens in " in lines[1]


def test_several_prompts_are_continued_in_order(run):
    result = run_script(
        "sample.py", run, "--prompt", "a dog", "--prompt", "the cat", "temperature=0"
    )
    first, second = result.stdout.splitlines()
    assert first.startswith("a dog")
    assert second.startswith("the cat")


def test_prompts_come_from_a_file_and_from_standard_input(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\nthe cat\n")
    greedy = "temperature=0"
    from_file = run_script("sample.py", run, "--file", tmp_path / "prompts.txt", greedy)
    from_stdin = run_script("sample.py", run, "--file", "-", greedy, stdin="a dog\nthe cat\n")
    assert from_file.returncode == from_stdin.returncode == 0
    assert from_file.stdout == from_stdin.stdout
    assert len(from_file.stdout.splitlines()) == 2


def test_the_latest_checkpoint_can_be_selected(run):
    assert run_script("sample.py", run, "--checkpoint", "latest").returncode == 0


def test_a_folder_that_is_not_a_run_is_one_line(folder):
    assert_rejected(run_script("sample.py", folder), "is not a run")


def test_a_missing_prompt_file_is_one_line(run):
    assert_rejected(
        run_script("sample.py", run, "--file", "nix.txt"), "--file nix.txt: No such file"
    )


def test_a_misspelled_setting_of_a_sample_is_one_line(run):
    result = run_script("sample.py", run, "temprature=0.5")
    assert_rejected(result, "Did you mean sample.temperature?")


def test_an_unknown_checkpoint_is_one_line(run):
    assert_rejected(run_script("sample.py", run, "--checkpoint", "first"), "Known: best, latest")


def test_sampling_without_a_run_prints_the_help():
    result = run_script("sample.py")
    assert result.returncode == 2
    assert "sample.temperature=0.5" in result.stdout


def test_the_scripts_stay_short():
    for name in ("train.py", "sample.py"):
        assert len((ROOT / name).read_text().splitlines()) < 60, name


def test_scripts_run_on_one_device_as_a_users_do(trained):
    assert "1 cpu device(s)\n" in trained.stdout  # these tests themselves have eight
