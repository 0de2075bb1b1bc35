"""The report of a run: what it tells, how it is built, and that nothing in it can act."""

import html.parser
import json
import math
import re
import shlex
import shutil
import subprocess

import jax
import numpy as np
import pytest
from tiny_runs import run_config

import jaxgpt
from jaxgpt import config as configs
from jaxgpt import report
from jaxgpt.cli import report as report_cli
from jaxgpt.config import Config, SampleConfig
from jaxgpt.config_files import list_configs
from jaxgpt.report import curves
from jaxgpt.report.facts import find_processor, flatten_numbers, make_command
from jaxgpt.settings import ConfigError
from jaxgpt.trainer.logging import read_metrics

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip
EVIL = "<script>document.title='evil'"
VOID = {"meta", "img", "line", "circle", "polyline", "br"}


class Outline(html.parser.HTMLParser):
    """Collect the elements of a page, and check that they are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def find(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose name, sample and results try to act."""
    folder = tmp_path_factory.mktemp("report")
    cfg = run_config(
        folder, f"name=a{EVIL}", "train.steps=6", "train.eval_every=3", "train.log_every=1",
        "train.sample_every=3", "optimizer.lr=0.003",
    )  # fmt: skip
    jaxgpt.train(cfg, is_quiet=True)
    path = sorted((folder / "runs").glob("*/samples/step_*.txt"))[-1]
    path.write_text(f"the cat </pre>{EVIL}</script>\n")
    results = {"tasks": {f"blimp{EVIL}": {"accuracy": 0.625, "parts": {"agreement": 0.5}}}}
    with open(f"{cfg.run_folder}/results.json", "w") as file:
        json.dump(results, file)
    return cfg


@pytest.fixture(scope="module")
def page(run):
    return report.write(run.run_folder)


@pytest.fixture(scope="module")
def outline(page):
    return Outline(page.html)


def test_a_report_has_every_section_and_a_link_to_each(outline):
    ids = [x["id"] for x in outline.find("h2")]
    assert ids == ["results", "curves", "samples", "parameters", "speed", "inside", "data",
                   "config", "repeat"]  # fmt: skip
    assert [x["href"] for x in outline.find("a")] == [f"#{name}" for name in ids]
    assert [x["aria-labelledby"] for x in outline.find("section")] == ids
    assert len(outline.find("h1")) == 1


def test_a_report_can_be_read_without_seeing_it(outline):
    assert all(x["scope"] in ("col", "row") for x in outline.find("th"))
    assert outline.find("th")
    images, charts = outline.find("img"), [x for x in outline.find("svg") if "role" in x]
    assert len(images) == 4
    assert len(charts) == 5
    assert all(len(x["alt"]) > 20 for x in images)
    assert all(x["role"] == "img" and len(x["aria-label"]) > 20 for x in charts)
    assert outline.find("html") == [{"lang": "en"}]
    assert all("tabindex" in x for x in outline.find("div") if x.get("class") == "scroll")


def test_nothing_in_a_report_can_act_and_nothing_is_requested(page, outline):
    assert not outline.find("script")
    assert not outline.find("link")
    policy = outline.find("meta")[2]["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for _, attributes in outline.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
    assert page.html.count("&lt;script&gt;") >= 4  # name, title, sample, benchmark
    assert "url(" not in page.html
    assert "@import" not in page.html


def test_a_report_tells_what_the_run_has_written(run, outline):
    text = " ".join(" ".join(outline.text).split())
    evaluations = [r for r in read_metrics(run.run_folder) if r["kind"] == "eval"]
    best = min(evaluations, key=lambda r: r["loss"])
    assert f"{best['loss']:.4f}" in text
    assert f"best (step {best['step']})" in text
    assert "0.6250" in text
    assert "parts/agreement" in text
    assert f"the cat </pre>{EVIL}</script>" in text
    total = jaxgpt.load(run.run_folder).params
    count = sum(x.size for x in jax.tree.leaves(total))
    assert f"{count:,} parameters" in text
    assert f"{6 * 16 * 16:,}" in text  # tokens: steps, rows, context
    assert jaxgpt.__version__ in text


def test_the_command_of_a_report_makes_the_same_config(run):
    words = shlex.split(make_command(run))
    assert words[:3] == ["jaxgpt", "train", "--config"]
    assert configs.load(words[3], words[4:]) == run
    for name in list_configs():
        assert shlex.split(make_command(configs.load(name)))[3:] == [name]
    changed = configs.load("gpt_mini", ["sample.stop=a b", "model.pattern=full,window"])
    words = shlex.split(make_command(changed))
    assert words[3] == "gpt_mini"
    assert configs.load(words[3], words[4:]) == changed


def test_a_config_that_no_command_makes_has_no_command():
    assert make_command(Config(sample=SampleConfig(stop=("a,b", "c")))) == ""


def test_a_line_goes_through_its_values():
    values = [(float(x), math.sin(x)) for x in range(7)]
    chart = curves.draw_chart({"sine": values, "none": []}, "A <title>", "unit")
    pairs = re.search(r'<polyline class="line0" points="([^"]+)"', chart)[1].split()
    points = np.array([[float(x) for x in pair.split(",")] for pair in pairs])
    x, y = np.array(values).T
    for at, value in ((points[:, 0], x), (-points[:, 1], y)):
        slope, offset = np.polyfit(value, at, 1)
        assert slope > 0
        np.testing.assert_allclose(at, slope * value + offset, atol=0.11)
    assert "A &lt;title&gt;" in chart
    assert "none" not in chart
    assert curves.draw_chart({"empty": [], "nan": [(0, math.nan)]}, "t", "u") == ""


@pytest.mark.parametrize(("low", "high"), [(0, 600), (3.3, 7.7), (-1e-4, 5e-4), (5, 5), (0, 0)])
def test_ticks_are_round_numbers_in_the_range(low, high):
    ticks = curves.choose_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(ticks)
    if high > low:
        assert low <= ticks[0] + 1e-12
        assert ticks[-1] <= high + 1e-12


def test_long_lines_are_thinned_out_and_keep_their_ends():
    points = [(float(i), float(i)) for i in range(10_001)]
    thin = curves.thin_out(points)
    assert len(thin) == curves.MAX_POINTS
    assert (thin[0], thin[-1]) == (points[0], points[-1])


def test_numbers_of_results_are_found_at_any_depth():
    found = flatten_numbers({"a": {"b": 1, "c": {"d": 0.5}}, "text": "x", "list": [1], "no": None})
    assert found == {"a/b": 1.0, "a/c/d": 0.5}


def test_the_processor_has_a_name(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: A Chip 9\n")
    assert find_processor(str(tmp_path / "cpuinfo")) == "A Chip 9"
    assert find_processor(str(tmp_path / "missing"))


def test_the_command_writes_one_file(run, tmp_path, capsys):
    out, extra = tmp_path / "r.html", tmp_path / "more.json"
    extra.write_text(json.dumps({"tasks": {"wic": {"accuracy": 0.123456}}}))
    arguments = [run.run_folder, "--out", str(out), "--results", str(extra), "--text", "the cat"]
    assert report_cli.main(arguments, "jaxgpt report") == 0
    assert f"{out}: " in capsys.readouterr().out
    text = out.read_text()
    assert "Benchmark wic" in text
    assert "0.1235" in text
    assert [x.name for x in tmp_path.iterdir() if "report" in x.name or "partial" in x.name] == []
    extra.write_text("[]")
    with pytest.raises(ConfigError, match=r"more.json is no file of results"):
        report_cli.main(arguments, "jaxgpt report")
    with pytest.raises(ConfigError, match="is not a run"):
        report_cli.main([str(tmp_path)], "jaxgpt report")


def test_a_saved_model_has_a_report_without_measurements(run, tmp_path):
    model = jaxgpt.load(run.run_folder)
    jaxgpt.save(model, tmp_path / "saved")
    found = Outline(report.write(str(tmp_path / "saved"), text="the cat").html)
    text = " ".join(found.text)
    for note in ("no evaluation yet", "no measurements yet", "no samples"):
        assert note in text
    assert len(found.find("img")) == 4


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_a_browser_shows_and_prints_a_report(page, tmp_path):
    path = tmp_path / "report.html"
    page.save(path)
    options = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path}",
    ]
    dom = subprocess.run(
        [*options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    ).stdout
    shown = Outline(dom.replace("<!DOCTYPE html>", ""))
    assert not shown.find("script")
    assert "evil" in dom
    assert "<title>evil" not in dom
    pdf = tmp_path / "report.pdf"
    subprocess.run(
        [*options, f"--print-to-pdf={pdf}", path.as_uri()], capture_output=True, timeout=120
    )
    assert pdf.read_bytes().startswith(b"%PDF")
