import functools
import io
import json
import subprocess
import sys

import pytest
from tiny_runs import has_drawing, single_device_env

from jaxgpt.trainer import logging
from jaxgpt.trainer.logging import (
    Console,
    MetricsFile,
    format_duration,
    plot_curves,
    read_metrics,
    write_text_atomically,
)
from jaxgpt.trainer.report import format_eval

FIGURES = dict(loss=2.5, lr=1e-3, tokens_per_second=12345.6, mfu=0.42, eta_seconds=65.0)


# --- metrics.jsonl ---


@pytest.fixture
def folder(tmp_path):
    """A run folder with one line for each of the steps 1 to 4."""
    file = MetricsFile(str(tmp_path), 0)
    for step in range(1, 5):
        file.write("train", step, {"loss": 1 / step, "nats": 1 / step, "tokens": step})
    file.close()
    return str(tmp_path)


def test_the_writer_of_the_board_is_imported_without_torch():
    pytest.importorskip("tensorboardX")
    code = (
        "import sys\nfrom jaxgpt.optional import import_board_writer\n"
        "print(import_board_writer().__name__, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=single_device_env()
    )
    assert done.stdout.split() == ["SummaryWriter", "False"], done.stderr


def test_only_the_likelihood_of_texts_has_a_perplexity():
    values = dict(loss=0.5, perplexity=1.65, accuracy=0.5, tokens=3, margin=0.1)
    shown = {unit: format_eval(values, unit) for unit in ("token", "pair", "answer")}
    assert shown == {
        "token": "held-out loss 0.5000 nats/token  perplexity 1.65  accuracy 50.0%  margin 0.1",
        "pair": "held-out loss 0.5000 nats/pair  accuracy 50.0%  margin 0.1",
        "answer": "held-out loss 0.5000  accuracy 50.0%  margin 0.1",
    }


def steps(folder):
    return [record["step"] for record in read_metrics(folder)]


def test_metrics_are_read_back_with_six_digits(folder):
    assert read_metrics(folder)[2] == dict(
        kind="train", step=3, loss=0.333333, nats=0.333333, tokens=3
    )


def test_evaluations_are_rounded_once(tmp_path):
    """3.325946 has become 3.32595 and then 3.3260, where the console printed 3.3259."""
    file = MetricsFile(str(tmp_path), 0)
    file.write("eval", 7, {"loss": 3.325946})
    file.close()
    assert f"{read_metrics(str(tmp_path))[0]['loss']:.4f}" == "3.3259"


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    file = MetricsFile(str(tmp_path), 0)
    file.write("eval", 7, {"loss": 1.0})
    assert steps(str(tmp_path)) == [7]
    file.close()


def test_a_resumed_run_drops_later_steps(folder):
    MetricsFile(folder, 2).close()
    assert steps(folder) == [1, 2]


def test_a_resumed_run_appends_to_the_steps_before(folder):
    file = MetricsFile(folder, 3)
    file.write("train", 4, {"loss": 9.0})
    file.close()
    assert [r["loss"] for r in read_metrics(folder)] == [1.0, 0.5, 0.333333, 9.0]


def test_a_line_truncated_by_a_kill_is_dropped(folder):
    with open(f"{folder}/metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    file = MetricsFile(folder, 4)
    file.write("train", 5, {"loss": 9.0})
    file.close()
    assert steps(folder) == [1, 2, 3, 4, 5]
    with open(f"{folder}/metrics.jsonl") as file:
        assert len([json.loads(line) for line in file]) == 5


def test_a_new_run_starts_with_an_empty_file(folder):
    MetricsFile(folder, 0).close()
    assert steps(folder) == []


def test_a_file_is_replaced_atomically(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    write_text_atomically(str(path), "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_loss_curve_is_drawn(folder):
    plot_curves(folder, "title")
    assert has_drawing(f"{folder}/plots/loss.png")


def test_a_plot_reads_one_record_at_a_time(folder, monkeypatch):
    """A long run has more records than should be in memory at every evaluation."""
    parse, living, most = logging._parse_record, set(), []

    class Record(dict):
        def __del__(self):
            living.discard(id(self))

    def count(line):
        record = Record(parse(line))
        living.add(id(record))
        most.append(len(living))
        return record

    monkeypatch.setattr(logging, "_parse_record", count)
    plot_curves(folder, "tiny")
    logging.plot_norms(folder, "tiny")
    assert len(most) == 8
    assert max(most) <= 2


def test_a_run_without_metrics_has_an_empty_plot(tmp_path):
    plot_curves(str(tmp_path), "title")
    assert not has_drawing(tmp_path / "plots" / "loss.png")


# --- console ---


@pytest.fixture
def terminal(monkeypatch):
    """terminal() makes stderr a terminal."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def set_terminal():
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(logging, "tqdm", functools.partial(logging.tqdm, ncols=120, nrows=40))
        return sys.stderr

    return set_terminal


def test_without_a_terminal_every_step_is_a_plain_line(capsys):
    console = Console(1000, 0)
    console.log_step(50, FIGURES)
    console.close()
    out, err = capsys.readouterr()
    assert out == ("step   50/1000  loss 2.500  lr 1.00e-03  12,346 tokens/s  MFU 42%  ETA 1m05s\n")
    assert err == ""


def test_a_line_omits_unknown_values(capsys):
    Console(10, 0).log_step(1, {"loss": 2.5, "lr": 1e-3})
    assert capsys.readouterr().out == "step  1/10  loss 2.500  lr 1.00e-03\n"


def test_on_a_terminal_the_metrics_are_beside_a_bar(capsys, terminal):
    screen = terminal()
    console = Console(1000, 0)
    console.log_step(500, FIGURES)
    console.close()
    assert capsys.readouterr().out == ""
    last = screen.getvalue().rstrip().split("\r")[-1]
    assert last.startswith(" 50%|#####     | step 500/1000, loss 2.500  lr 1.00e-03")
    assert last.endswith("ETA 1m05s")


def test_on_a_terminal_the_bar_of_a_resumed_run_starts_at_its_step(terminal):
    screen = terminal()
    Console(1000, 250).close()
    assert " 25%|##5       | step 250/1000" in screen.getvalue()


def test_on_a_terminal_lines_are_printed_above_the_bar(capsys, terminal):
    screen = terminal()
    console = Console(1000, 0)
    console.log("held-out loss 2.0")
    console.close()
    assert capsys.readouterr().out == "held-out loss 2.0\n"
    assert "step 0/1000" in screen.getvalue().rstrip().split("\r")[-1]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_quiet_console_prints_nothing(is_terminal, capsys, terminal):
    screen = terminal() if is_terminal else None
    console = Console(1000, 0, is_quiet=True)
    console.log("hello")
    console.log_step(50, FIGURES)
    console.close()
    assert capsys.readouterr() == ("", "")
    assert not (screen and screen.getvalue())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.7, "1h00m"),
        (7620, "2h07m"),
        (360_000, "100h00m"),
    ],
)
def test_durations_are_formatted_in_short_units(seconds, text):
    assert format_duration(seconds) == text
