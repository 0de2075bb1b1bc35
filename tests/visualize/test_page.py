"""The page about the inside of a model: its data, and its use in a real browser."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from inspected import TEXT, make_model

from jaxgpt import inspect, visualize
from jaxgpt.settings import ConfigError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)  # fmt: skip
# What a reader does, and what the page shows afterwards, as JSON in the document.
USE = """
<script>
const seen = { blocked: [] };
document.addEventListener("securitypolicyviolation",
  (e) => seen.blocked.push(e.effectiveDirective));
document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/pixel.png" }));
const buttons = [...document.querySelectorAll("#tokens button")];
seen.tokens = buttons.map((b) => b.textContent);
seen.labels = buttons.every((b) => b.getAttribute("aria-label"));
buttons[3].dispatchEvent(new MouseEvent("mouseenter"));
seen.hover = document.getElementById("detail").textContent;
buttons[2].focus();
document.getElementById("tokens").dispatchEvent(
  new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
seen.pressed = buttons.findIndex((b) => b.getAttribute("aria-pressed") === "true");
seen.tabbable = buttons.filter((b) => b.tabIndex === 0).length;
seen.about = document.getElementById("attribution-about").textContent;
const heads = [...document.querySelectorAll("#heads button")];
seen.heads = heads.length;
heads[heads.length - 1].click();
seen.head = document.getElementById("head-name").textContent;
seen.drawn = document.getElementById("matrix").width;
seen.arcs = document.querySelectorAll("#arcs path").length;
seen.lens = document.querySelectorAll("#lens tbody tr").length;
seen.neurons = document.querySelectorAll("#neurons tr").length;
seen.visible = [...document.querySelectorAll("main section:not(.hidden)")].map((s) => s.id);
seen.requested = performance.getEntriesByType("resource").map((entry) => entry.name);
seen.evil = Boolean(window.evil);
setTimeout(() => document.body.append(Object.assign(document.createElement("pre"), {
  id: "seen", textContent: btoa(unescape(encodeURIComponent(JSON.stringify(seen)))) })), 500);
</script>
"""


def read_data(page: visualize.Page) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.html, re.S)
    return json.loads(found[1])


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def page(model):
    return visualize.look(model, "</script><script>window.evil=1</script> né")


def test_the_data_of_the_page_are_those_of_inspect(model):
    data = read_data(visualize.look(model, TEXT, title="Title"))
    assert data["title"] == "Title"
    text = inspect.encode(model, TEXT)
    assert data["pieces"] == list(text.pieces)
    losses = inspect.token_losses(model, TEXT)
    assert data["surprisal"][0] is None
    np.testing.assert_allclose(data["surprisal"][1:], losses[1:], atol=1e-4)
    (attention,) = data["attention"]
    stored = np.frombuffer(base64.b64decode(attention["data"]), np.uint8).reshape(2, 4, 10, 10)
    np.testing.assert_allclose(stored / 255, inspect.attention(model, TEXT), atol=0.002)
    logits = inspect.capture(model, TEXT, []).logits
    np.testing.assert_allclose(data["attribution"]["logits"], logits.max(-1), atol=1e-3)
    streams = inspect.capture(model, TEXT, ["layers.*.residual_post"]).stack("residual_post")
    np.testing.assert_allclose(
        data["norms"]["values"][1:], np.linalg.norm(streams, axis=-1), atol=1e-3
    )
    assert [row["layer"] for row in data["neurons"]] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (dict(mixers=("gru",), position="none"), ["attention"]),
        (dict(objective="masked", family="encoder", head="mlm"), ["surprisal", "attribution"]),
        (dict(objective="classify", family="encoder", classes=3), ["lens", "guesses"]),
    ],
)
def test_a_page_has_what_the_model_has(settings, missing):
    data = read_data(visualize.look(make_model(**settings), TEXT))
    assert [key for key in missing if data[key]] == []
    assert data["norms"]["values"]


def test_a_pair_has_three_kinds_of_attention():
    model = make_model("pairs", family="encoder_decoder", encoder_layers=1)
    data = read_data(visualize.look(model, "ab", source="the source"))
    assert [(a["name"], len(a["queries"]), len(a["keys"])) for a in data["attention"]] == [
        ("the text to itself", 3, 3),
        ("the text to its source", 3, 12),
        ("the source to itself", 12, 12),
    ]


def test_a_page_of_a_long_text_is_refused():
    with pytest.raises(ConfigError, match="601 tokens, and a page shows at most 512"):
        visualize.look(make_model(context=700), "a" * 600)


def test_a_page_shows_itself_in_a_notebook_and_is_written_whole(page, tmp_path):
    assert page._repr_html_().startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.html
    with pytest.raises(ConfigError, match="cannot be written"):
        page.save(tmp_path / "missing" / "page.html")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_the_page_works_in_a_browser_and_requests_nothing(page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page.html.replace("</body>", USE + "</body>"), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         "--virtual-time-budget=5000", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="seen">([^<]*)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(base64.b64decode(found[1]).decode())
    assert seen["tokens"][:2] == ["<bos>", "<"]
    assert seen["labels"]
    assert not seen["evil"]
    assert seen["hover"].startswith("3: “s”")
    assert "the model expected:" in seen["hover"]
    assert (seen["pressed"], seen["tabbable"]) == (3, 1)
    assert seen["about"].startswith("After “s” the likeliest token is")
    assert (seen["heads"], seen["head"]) == (8, "Layer 1, head 3")
    assert seen["drawn"] == len(seen["tokens"])
    assert 1 <= seen["arcs"] <= 4  # token 3 looks at 4 tokens at most
    assert (seen["lens"], seen["neurons"]) == (3, 2)
    assert seen["visible"] == ["s-tokens", "s-attention", "s-lens", "s-attribution", "s-norms",
                               "s-neurons"]  # fmt: skip
    assert seen["requested"] == []
    assert seen["blocked"] == ["img-src"]  # the picture that the test adds


def test_a_page_of_64_tokens_of_a_12_layer_model_is_small():
    model = make_model(layers=12, heads=12, kv_heads=12, width=24, context=65)
    page = visualize.look(model, "x" * 63)
    assert len(page.html.encode()) < 5e6
