"""What may go wrong with a run and its folder: each ends in one line, and no work is lost."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import closing

import jax
import numpy as np
import pytest
from tiny_runs import assert_same_bits, config, make_training, restore_latest, run_config

from jaxgpt import compile_cache
from jaxgpt import config as configs
from jaxgpt.config import override
from jaxgpt.loading import load, read_config
from jaxgpt.optimizer import build as build_optimizer
from jaxgpt.saved_arrays import DamagedError, get_shapes, is_readable, latest_step
from jaxgpt.seeds import make_key
from jaxgpt.settings import ConfigError
from jaxgpt.trainer import Progress, RunError, loop, memory, report, train
from jaxgpt.trainer import checkpoint as checkpoint_module
from jaxgpt.trainer import folder as folder_module
from jaxgpt.trainer import logging as logging_module
from jaxgpt.trainer import run as run_module
from jaxgpt.trainer.checkpoint import Checkpoints, SaveError
from jaxgpt.trainer.hooks import EarlyStop, OverfitWarning
from jaxgpt.trainer.logging import Console, MetricsFile, read_metrics
from jaxgpt.trainer.report import format_duration
from jaxgpt.trainer.stop import StopSignal

SETTINGS = ["train.steps=4", "train.eval_every=2", "train.save_every=2", "train.log_every=1"]

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    monkeypatch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def trained(folder):
    """A complete run."""
    cfg = run_config(folder, "name=done", *SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
        train(cfg, is_quiet=True)
    return cfg


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the run, in another folder."""
    cfg = override(trained, [f"folder={tmp_path}"])
    shutil.copytree(trained.run_folder, cfg.run_folder)
    return cfg


# --- paths ---


@pytest.mark.parametrize("name", ["lr[1e-3]", "what?", "all*"])
def test_a_run_whose_path_is_a_pattern_is_saved_and_read(folder, name):
    cfg = run_config(folder, f"name={name}", *SETTINGS)
    train(override(cfg, ["train.steps=4"]), is_quiet=True)
    assert load(cfg.run_folder, checkpoint="latest").step == 4
    assert train(override(cfg, ["train.steps=5", "resume=force"]), is_quiet=True).step == 5


def test_a_renamed_or_moved_run_resumes(copy):
    moved = override(copy, ["name=renamed"])
    os.rename(copy.run_folder, moved.run_folder)
    assert train(override(moved, ["data.cache=" + copy.folder]), is_quiet=True).step == 4


def test_other_paths_of_the_same_text_resume(copy, monkeypatch):
    monkeypatch.chdir(os.path.dirname(copy.data.source))
    for source in ("./text", "text", os.path.join(copy.data.source, "..", "text")):
        assert train(override(copy, [f"data.source={source}"]), is_quiet=True).step == 4


def test_another_text_does_not_resume_and_both_sources_are_named(copy, tmp_path):
    (tmp_path / "other.txt").write_text("another text, and long enough to be trained on. " * 90)
    with pytest.raises(ConfigError, match=r"has other text than data.source='.*text'"):
        train(override(copy, [f"data.source={tmp_path}/other.txt"]), is_quiet=True)


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert config("folder=~/runs", "name=a").run_folder == "/home/somebody/runs/a"


# --- what is in the way ---


@pytest.mark.parametrize("name", ["", "samples", "plots", "tensorboard", "checkpoints", "best"])
def test_a_file_in_place_of_a_folder_is_refused_by_its_path(folder, name):
    cfg = run_config(folder, f"name=file_{name or 'run'}", *SETTINGS)
    path = os.path.join(cfg.run_folder, name).rstrip("/")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w"):
        pass
    with pytest.raises(ConfigError, match=f"{path} is a file, and the run writes a folder there"):
        train(cfg, is_quiet=True)


def test_a_folder_in_place_of_a_file_is_refused_by_its_path(folder):
    cfg = run_config(folder, "name=folder", *SETTINGS)
    os.makedirs(os.path.join(cfg.run_folder, "metrics.jsonl"))
    with pytest.raises(ConfigError, match=r"metrics.jsonl is a folder, and the run writes a file"):
        train(cfg, is_quiet=True)


def test_a_name_that_is_too_long_is_refused(folder):
    cfg = run_config(folder, f"name={'n' * 300}", *SETTINGS)
    with pytest.raises(ConfigError, match=r"cannot be used.*File name too long"):
        train(cfg, is_quiet=True)


def test_a_complete_run_in_a_read_only_folder_is_left_as_it_is(copy, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "is_writable", lambda folder: False)
    before = sorted(os.walk(copy.run_folder))
    assert train(copy).step == 4
    assert "This run is complete" in capsys.readouterr().out
    assert sorted(os.walk(copy.run_folder)) == before


def test_a_read_only_folder_is_refused_before_training(copy, monkeypatch):
    for module in (run_module, folder_module):
        monkeypatch.setattr(module, "is_writable", lambda folder: False)
    for cfg in (override(copy, ["train.steps=6", "resume=force"]), override(copy, ["name=new"])):
        with pytest.raises(ConfigError, match="cannot be written"):
            train(cfg, is_quiet=True)


def test_an_error_of_a_file_gives_its_path_and_the_last_good_step(copy, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", "/disk/file")

    monkeypatch.setattr(EarlyStop, "on_eval", fail)
    with pytest.raises(RunError, match=r"/disk/file: No space left.* is of step 4"):
        train(override(copy, ["train.steps=6", "resume=force"]), is_quiet=True)


# --- a full disk ---


class FullDisk:
    """Makes writing fail: of checkpoints, of metrics, of samples and plots."""

    ERROR = OSError(28, "No space left on device")

    def __init__(self, patch, saves=(), best=()):
        self.patch, self.saves, self.best = patch, set(saves), set(best)
        save = checkpoint_module.sum_arrays

        def fail_at(**trees):
            step = self.run.progress.step
            kind = self.saves if "rest" in trees else self.best
            if step in kind:
                kind.discard(step) if self.is_once else None
                raise self.ERROR
            return save(**trees)

        self.run, self.is_once = None, False
        patch.setattr(checkpoint_module, "sum_arrays", fail_at)
        open_run = loop.open_run

        def open_and_remember(*arguments):
            self.run = open_run(*arguments)
            return self.run

        patch.setattr(loop, "open_run", open_and_remember)


FULL = ["train.steps=6", "train.eval_every=2", "train.save_every=2", "train.log_every=1"]


def test_training_goes_on_after_a_checkpoint_that_cannot_be_saved(folder, monkeypatch, capsys):
    cfg = run_config(folder, "name=full", *FULL)
    FullDisk(monkeypatch, saves=[2])
    assert train(cfg).step == 6
    checkpoints = os.path.join(cfg.run_folder, "checkpoints")
    assert sorted(os.listdir(checkpoints)) == ["4", "6"]
    out = capsys.readouterr().out
    assert out.count("checkpoints/2 could not be saved (No space left on device)") == 1
    assert "Training goes on to the next save (train.on_save_error=continue)" in out


def test_a_run_whose_last_state_cannot_be_saved_ends_with_an_error(folder, monkeypatch, capsys):
    cfg = run_config(folder, "name=full_at_the_end", *FULL)
    FullDisk(monkeypatch, saves=[6])
    with pytest.raises(SaveError, match=r"checkpoints/6 could not be saved .* is of step 4"):
        train(cfg)
    assert latest_step(os.path.join(cfg.run_folder, "checkpoints")) == 4
    assert "could not be saved" not in capsys.readouterr().out  # the error is the one message


def test_the_last_state_is_saved_at_a_second_try(folder, monkeypatch):
    cfg = run_config(folder, "name=full_for_a_moment", *FULL)
    FullDisk(monkeypatch, saves=[6]).is_once = True
    assert train(cfg, is_quiet=True).step == 6
    assert latest_step(os.path.join(cfg.run_folder, "checkpoints")) == 6


def test_a_run_stops_at_a_save_error_if_that_is_set(folder, monkeypatch):
    cfg = run_config(folder, "name=full_stop", *FULL, "train.on_save_error=stop")
    FullDisk(monkeypatch, saves=[4])
    with pytest.raises(SaveError, match=r"checkpoints/4 could not be saved"):
        train(cfg, is_quiet=True)
    assert latest_step(os.path.join(cfg.run_folder, "checkpoints")) == 2
    assert [r["step"] for r in read_metrics(cfg.run_folder)][-1] == 4
    monkeypatch.undo()
    monkeypatch.setattr(run_module, "peak_flops", lambda devices: (1e12, "a guess"))
    assert train(cfg, is_quiet=True).step == 6  # the folder is whole, and unlocked


def test_the_best_loss_is_that_of_the_best_checkpoint_on_disk(folder, monkeypatch):
    cfg = run_config(folder, "name=full_best", *FULL)
    FullDisk(monkeypatch, best=[4, 6])
    progress = train(cfg, is_quiet=True)
    evals = {r["step"]: r["loss"] for r in read_metrics(cfg.run_folder) if r["kind"] == "eval"}
    assert evals[6] < evals[4] < evals[2]
    assert latest_step(os.path.join(cfg.run_folder, "best")) == progress.best_step == 2
    assert progress.best_loss == pytest.approx(evals[2], abs=1e-4)
    monkeypatch.undo()
    assert load(cfg.run_folder).step == 2


def test_metrics_that_cannot_be_written_are_written_later(tmp_path):
    lines = []
    metrics = MetricsFile(str(tmp_path), 0, lines.append)
    file, disk = metrics._file, {"free": 10}

    class Disk:
        def write(self, data):
            if not disk["free"]:
                raise FullDisk.ERROR
            written = file.write(data[: disk["free"]])  # a part, as a disk that becomes full does
            disk["free"] -= written
            return written

        close = file.close

    metrics._file = Disk()
    for step in (1, 2):
        metrics.write("train", step, {"loss": 1.0})
    disk["free"] = 10**9
    metrics.write("train", 3, {"loss": 1.0})
    metrics.close()
    assert [r["step"] for r in read_metrics(str(tmp_path))] == [1, 2, 3]
    assert len(lines) == 1
    assert "metrics.jsonl cannot be written (No space left on device); training goes on" in lines[0]


def test_the_thread_of_tensorboard_survives_a_full_disk(tmp_path):
    pytest.importorskip("tensorboardX")
    lines = []
    metrics = MetricsFile(str(tmp_path), 0, lines.append)
    events = metrics._board.file_writer.event_writer._ev_writer

    class Disk:
        def write(self, *_):
            raise FullDisk.ERROR

        flush = close = write

    events._py_recordio_writer._writer, file = Disk(), events._py_recordio_writer._writer
    for step in range(40):  # more than its queue holds
        metrics.write("train", step, {"loss": 1.0})
    metrics.close()
    file.close()
    assert any("cannot be written (No space left on device)" in line for line in lines)
    assert len(read_metrics(str(tmp_path))) == 40


def test_samples_and_plots_that_cannot_be_written_do_not_end_a_run(folder, monkeypatch, capsys):
    cfg = run_config(folder, "name=full_of_plots", *FULL, "train.sample_every=2")

    def fail(*_):
        raise FullDisk.ERROR

    monkeypatch.setattr(logging_module, "plot_curves", fail)
    monkeypatch.setattr(loop, "write_text_atomically", fail)
    assert train(cfg).step == 6
    out = capsys.readouterr().out
    assert out.count("plots cannot be written (No space left on device); training goes on.") == 1
    assert out.count("step_000000.txt cannot be written") == 1
    assert out.count("cannot be written") == 2


def test_a_file_that_cannot_be_written_leaves_no_part_of_it(tmp_path, monkeypatch):
    def fail(*_):
        raise FullDisk.ERROR

    monkeypatch.setattr(logging_module.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        logging_module.write_text_atomically(str(tmp_path / "a.txt"), "text")
    assert os.listdir(tmp_path) == []


def test_a_run_resumes_on_a_full_disk_until_it_saves(copy, monkeypatch):
    """Nothing is written anew at the start that is there already."""

    def fail(*_):
        raise FullDisk.ERROR

    monkeypatch.setattr(run_module, "write_text_atomically", fail)
    monkeypatch.setattr(logging_module, "write_text_atomically", fail)
    cfg = read_config(copy.run_folder)
    run = run_module.open_run(override(cfg, ["resume=force"]), is_quiet=True)
    run.close()
    with pytest.raises(RunError, match="No space left on device; the last good checkpoint"):
        train(override(cfg, ["resume=force", "train.steps=6"]), is_quiet=True)


def test_the_tracebacks_of_a_failed_save_are_not_printed(tmp_path, caplog):
    """The error itself is raised, and logged in one line."""
    Checkpoints(str(tmp_path), keep=1).close()
    code = compile("raise OSError(28, 'No space left')", "orbax/checkpoint/async_path.py", "exec")
    for name, is_shown in (("asyncio", False), ("absl", False), ("mine", True)):
        caplog.clear()
        try:
            exec(code)
        except OSError:
            logging.getLogger(name).exception("Future exception was never retrieved")
        assert bool(caplog.records) == is_shown
    logging.getLogger("asyncio").error("another error")
    assert caplog.records[-1].getMessage() == "another error"


def test_a_command_does_not_wait_for_the_threads_of_a_failed_save():
    code = (
        "import threading\nfrom jaxgpt import script\n"
        "class Waiting(threading.Thread):\n"
        "    __module__ = 'orbax.checkpoint.future'\n"
        "    def run(self):\n        threading.Event().wait()\n"
        "def main():\n    Waiting().start()\n    print('done')\n    return 1\n"
        "script.run(main, 'x')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, b"done\n")


def test_a_new_run_on_a_full_disk_ends_in_one_line(folder, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", "/disk/config.json")

    monkeypatch.setattr(run_module, "write_text_atomically", fail)
    with pytest.raises(RunError, match=r"^/disk/config.json: No space left on device; there is no"):
        train(run_config(folder, "name=full_at_start", *FULL), is_quiet=True)


@pytest.mark.parametrize(
    "line", ["null", "7", "[]", '{"kind": "train"}', '{"step": "x"}', "\udcff\udcfe", "[" * 99999]
)
def test_damaged_lines_of_the_metrics_are_dropped(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    good = '{"kind": "train", "step": 1, "loss": 1.0}\n'
    path.write_bytes((good + line + "\n" + good).encode(errors="surrogateescape"))
    assert [r["step"] for r in read_metrics(str(tmp_path))] == [1, 1]
    MetricsFile(str(tmp_path), 1).close()
    assert path.read_text() == good * 2


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[" * 100_000, b'{"model": {"width": "x"}}'])
def test_a_damaged_config_is_one_message_with_its_path(copy, content):
    path = os.path.join(copy.run_folder, "config.json")
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(ConfigError, match=path):
        read_config(copy.run_folder)


def test_a_config_of_another_model_does_not_call_the_checkpoint_damaged(copy):
    path = os.path.join(copy.run_folder, "config.json")
    with open(path) as file:
        values = json.load(file)
    values["model"]["width"] = 10**9
    with open(path, "w") as file:
        json.dump(values, file)
    with pytest.raises(ConfigError) as error:
        load(copy.run_folder)
    assert "is of another model" in str(error.value)
    assert "elete" not in str(error.value)


# --- checkpoints ---


def test_an_older_checkpoint_is_kept_until_the_new_one_is_read_back(tmp_path, monkeypatch):
    state = make_training(config()).make_state()
    with closing(Checkpoints(str(tmp_path), keep=1)) as checkpoints:
        checkpoints.save(state, Progress(step=1))
        checkpoints.wait()

        def fail(folder):
            raise ValueError("no manifest")

        monkeypatch.setattr(checkpoint_module, "read_manifest", fail)
        checkpoints.save(state, Progress(step=2))
        with pytest.raises(RunError, match=r"checkpoints/2 could not be saved .*is of step 1"):
            checkpoints.wait()
        assert is_readable(str(tmp_path / "checkpoints" / "1"))


def test_the_shapes_that_are_read_back_are_those_of_the_state(tmp_path):
    state = make_training(config()).make_state()
    with closing(Checkpoints(str(tmp_path), keep=1)) as checkpoints:
        checkpoints.save(state, Progress(step=1))
    saved = checkpoint_module.read_manifest(str(tmp_path / "checkpoints" / "1"))
    assert get_shapes(saved["params"]) == get_shapes(state.params)
    assert saved["progress"]["step"] == 1


def empty_params(cfg, folder) -> str:
    """Damage the last checkpoint of a folder; return its path."""
    path = os.path.join(cfg.run_folder, folder)
    path = os.path.join(path, str(latest_step(path)))
    shutil.rmtree(os.path.join(path, "params"))
    os.makedirs(os.path.join(path, "params"))
    return path


def test_in_place_of_a_damaged_best_the_latest_is_loaded_with_a_warning(copy, capsys):
    best = empty_params(copy, "best")
    assert load(copy.run_folder).origin == os.path.join(copy.run_folder, "checkpoints", "4")
    warning = rf"warning: the checkpoint {best} is damaged .*checkpoints/4 is used in its place"
    assert re.search(warning, capsys.readouterr().err)
    assert load(copy.run_folder, checkpoint="latest").step == 4
    assert not capsys.readouterr().err


def test_checkpoints_are_tried_from_the_latest_to_the_best(copy, capsys):
    empty_params(copy, "checkpoints")
    assert load(copy.run_folder, checkpoint="latest").origin.endswith("checkpoints/2")
    shutil.rmtree(os.path.join(copy.run_folder, "checkpoints", "2"))
    assert load(copy.run_folder, checkpoint="latest").origin.endswith("best/4")
    empty_params(copy, "best")
    with pytest.raises(DamagedError, match=r"checkpoints/4 is damaged"):
        load(copy.run_folder, checkpoint="latest")


def test_a_flipped_bit_of_the_config_is_refused_by_its_path(copy):
    path = os.path.join(copy.run_folder, "config.json")
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(text.replace('"lr": 0.01', '"lr": 0.03'))
    for use in (load, lambda folder: train(copy, is_quiet=True)):
        with pytest.raises(ConfigError, match=f"{path} is not as it was written"):
            use(copy.run_folder)
    with open(path, "w") as file:  # a change on purpose
        values = json.loads(text)
        del values["versions"]["checksum"]
        values["sample"]["tokens"] = 5
        json.dump(values, file)
    assert load(copy.run_folder).config.sample.tokens == 5


def test_another_tokenizer_does_not_start_a_run(copy, folder):
    path = os.path.join(copy.run_folder, "tokenizer.json")
    with open(path) as file:
        text = file.read()
    with open(path, "w") as file:
        file.write(text.replace("<unk>", "<unl>"))
    with pytest.raises(ConfigError, match=r"train\.start=.* is not the tokenizer that"):
        train(run_config(folder, "name=start", f"train.start={copy.run_folder}"), is_quiet=True)


def test_the_steps_that_a_kill_has_cost_are_named(copy, capsys):
    with open(os.path.join(copy.run_folder, "metrics.jsonl"), "a") as file:
        file.write('{"kind": "train", "step": 5, "loss": 1.0}\n')
    train(override(copy, ["train.steps=6", "resume=force"]))
    line = "lost   1 steps or more, made after step 4 was saved: they are made again. A kill costs"
    assert line in capsys.readouterr().out


# --- signals ---


def test_a_signal_is_acknowledged_while_a_step_runs():
    lines, heard = [], threading.Event()

    def log(line):
        lines.append(line)
        heard.set()

    with StopSignal(log) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.wait(10)
    assert lines == ["SIGTERM: stopping after the current step, and saving"]
    assert stop.name == "SIGTERM"
    assert signal.set_wakeup_fd(-1) == -1


def test_a_repeated_sigterm_has_no_effect_while_a_run_is_saving():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal(lambda line: None) as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert stop.name == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) is before  # Ctrl-C interrupts
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_lost_connection_saves_and_ends(folder, monkeypatch):
    cfg = run_config(folder, "name=hangup", *SETTINGS)
    run_eval = loop.run_eval

    def hang_up(run):
        run_eval(run)
        os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(loop, "run_eval", hang_up)
    assert train(cfg, is_quiet=True).step == 2
    assert latest_step(os.path.join(cfg.run_folder, "checkpoints")) == 2


def test_a_command_that_ignores_hangups_goes_on_ignoring_them():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal(lambda line: None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.name
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_files_are_opened(closed, tmp_path):
    code = (
        "import os, sys\nfrom jaxgpt import script\n"
        "def main():\n"
        "    print('out'); print('err', file=sys.stderr); sys.stdin.read(0)\n"
        f"    fd = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "    return 0 if fd > 2 else 9\n"
        "script.run(main, 'x')\n"
    )
    command = f"{sys.executable} -c {json.dumps(code)} {closed}"
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], capture_output=True
    )
    assert done.returncode == 0, (command, done.stderr)


# --- settings ---


def test_every_bit_of_a_seed_counts():
    seeds = [0, 1, 2**32, 2**32 + 1, 2**62, 2**63 - 1]
    keys = {tuple(np.asarray(jax.random.key_data(make_key(seed))).tolist()) for seed in seeds}
    assert len(keys) == len(seeds)
    for seed in (0, 7, 2**31, 2**32 - 1):
        assert_same_bits(jax.random.key_data(make_key(seed)), jax.random.PRNGKey(seed))


@pytest.mark.parametrize("key", ["seed", "sample.seed"])
def test_a_seed_that_is_too_large_is_refused(key):
    with pytest.raises(ConfigError, match=f"^{key}="):
        config(f"{key}={2**63}")


def test_the_warmup_follows_the_steps():
    rates = []
    for steps in (20, 2000):
        cfg = override(configs.Config(), [f"train.steps={steps}"])
        _, schedule = build_optimizer(cfg.optimizer, steps, {"w": "D>F"})
        peak = np.float32(cfg.optimizer.lr)
        rates.append([np.float32(schedule(s)) for s in range(steps)].index(peak))
    assert rates == [0, 99]  # 1 and 100 steps of warmup


def test_a_short_trial_shortens_the_warmup_of_its_config_in_proportion():
    assert configs.load("gpt_mini", ["train.steps=40"]).optimizer.warmup == 2
    assert configs.load("gpt_mini", ["train.steps=500"]).optimizer.warmup == 100
    with pytest.raises(ConfigError, match=r"optimizer.warmup=50 is longer than train.steps=40"):
        configs.load("gpt_mini", ["train.steps=40", "optimizer.warmup=50"])


def test_an_unset_warmup_is_the_same_setting_as_its_number():
    unset = configs.Config()
    assert not configs.list_differences(unset, override(unset, ["optimizer.warmup=100"]))
    assert configs.list_differences(unset, override(unset, ["optimizer.warmup=99"]))


# --- best ---


def test_the_best_of_a_run_goes_by_accuracy_if_that_is_set():
    cfg, best = config("train.best_by=accuracy"), Progress(best_loss=1.0, best_accuracy=0.5)
    assert loop.is_better(cfg, {"loss": 2.0, "accuracy": 0.6}, best)
    assert not loop.is_better(cfg, {"loss": 0.5, "accuracy": 0.4}, best)
    assert loop.is_better(cfg, {"loss": 0.9, "accuracy": 0.5}, best)
    assert not loop.is_better(cfg, {"loss": 1.0, "accuracy": 0.5}, best)
    assert loop.is_better(config(), {"loss": 0.5, "accuracy": 0.4}, best)


def test_a_classifier_goes_by_accuracy_by_default():
    assert config().best_by == "loss"
    assert configs.load("sentiment").best_by == "accuracy"


def test_the_console_shows_the_loss_that_is_plotted(capsys):
    values = {"loss": 2.5, "nats": 2.25, "lr": 1e-3}
    Console(10, 0).log_step(1, values)
    assert "loss 2.250 (2.500 with penalties)  lr" in capsys.readouterr().out


# --- the first minutes ---


def test_an_untrained_model_is_evaluated_and_changes_nothing(trained, folder, monkeypatch):
    evals = [r["step"] for r in read_metrics(trained.run_folder) if r["kind"] == "eval"]
    assert evals == [0, 2, 4]
    cfg = run_config(folder, "name=unseen", *SETTINGS)
    monkeypatch.setattr(loop, "show_untrained", lambda run: None)
    train(cfg, is_quiet=True)
    assert_same_bits(restore_latest(cfg)[0], restore_latest(trained)[0])


def test_samples_are_shown_one_below_the_other(folder, capsys, monkeypatch):
    monkeypatch.setattr(loop, "EARLY_SAMPLES", (1,))
    settings = ["train.steps=9", "train.sample_every=100", "train.eval_every=9"]
    cfg = run_config(folder, "name=samples", *settings)
    train(cfg)
    out = capsys.readouterr().out
    names = sorted(os.listdir(os.path.join(cfg.run_folder, "samples")))
    assert names == ["step_000000.txt", "step_000001.txt", "step_000009.txt"]
    lines = out.splitlines()
    begin = lines.index("how its samples began:")
    assert [line.split()[1] for line in lines[begin + 1 : begin + 3]] == ["0", "9"]
    assert len([line for line in lines[-3:] if line.startswith("  jaxgpt ")]) == 3


def test_too_many_epochs_and_years_are_said_before_training(folder, capsys, monkeypatch):
    monkeypatch.setattr(run_module, "peak_flops", lambda devices: (1.0, "a guess"))
    monkeypatch.setattr(report, "MAX_EPOCHS", 0.1)
    train(run_config(folder, "name=epochs", *SETTINGS))
    out = capsys.readouterr().out
    assert "the model will learn the text by heart" in out
    assert "--plan shows what would fit" in out


@pytest.mark.parametrize(
    ("days", "text"), [(9, "216h00m"), (12, "12 days"), (460 * 365, "460 years")]
)
def test_long_durations_are_in_days_and_years(days, text):
    assert format_duration(days * 86400) == text


def test_overfitting_is_said_once():
    class View:
        step, lines = 0, []

        def log(self, text):
            self.lines.append(text)

    hook, view = OverfitWarning(), View()
    for training, held in [(3, 3), (2.5, 2.8), (2, 2.9), (1.5, 3.0), (1, 3.1), (0.5, 3.2)]:
        view.step += 10
        hook.on_metrics(view, view.step, {"nats": training})
        hook.on_eval(view, {"loss": held})
    assert len(view.lines) == 1
    assert "since step 20 the held-out loss has risen from 2.800 to 3.100" in view.lines[0]
    for training, held in [(2.6, 2.9), (2.7, 3.0), (2.8, 3.1)]:  # not learning is something else
        other = OverfitWarning()
        other.on_metrics(view, 0, {"nats": training})
        other.on_eval(view, {"loss": held})
    assert len(view.lines) == 1


def test_a_state_that_does_not_fit_is_refused_with_what_would(folder, monkeypatch):
    monkeypatch.setattr(memory, "read_memory_bytes", lambda device: 10_000)
    with pytest.raises(ConfigError, match=r"need .* GB on each device.* parameters would fit"):
        train(run_config(folder, "name=large", *SETTINGS), is_quiet=True)


# --- the compilation cache ---


def test_the_compile_cache_is_a_bounded_user_folder(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    updates = {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jax.config, "update", lambda name, value: updates.update({name: value}))
    if before:
        compile_cache.enable_compile_cache()
        assert not updates  # the user's choice
        monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", None, raising=False)
    compile_cache.enable_compile_cache()
    assert updates["jax_compilation_cache_dir"] == str(tmp_path / "jaxgpt")
    assert updates["jax_compilation_cache_max_size"] == compile_cache.MAX_BYTES
