"""The chat page in a real browser: with answers that the test writes, and with the server."""

import importlib.resources
import json
import math

import pytest
from browser import PROGRAM, Browser
from serving import make_played, piece, run_server, wait_until

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium")

PAGE = importlib.resources.files("jaxgpt.serve").joinpath("page.html")

# In place of the server: `answers` are taken in order, each a status and lines of a body; what was
# requested is in `requests`. A line of `null` waits until `release()`.
STAND_IN = """
const requests = [], answers = [];
let release = () => {};
window.fetch = async (path, { method = "GET", headers = {}, body, signal } = {}) => {
  if (path === "v1/models") {
    if (window.needsKey && headers.Authorization !== "Bearer secret")
      return new Response(JSON.stringify({ error: { message: "no key" } }), { status: 401 });
    const data = (window.models ?? ["tiny"]).map((id) => ({ id }));
    return new Response(JSON.stringify({ data }));
  }
  requests.push({ path, headers, body: JSON.parse(body) });
  const { status = 200, lines } = answers.shift();
  const stream = new ReadableStream({ async start(controller) {
    signal?.addEventListener("abort", () => { try { controller.error(signal.reason); } catch {} });
    for (const line of lines) {
      if (line === null) await new Promise((go) => { release = go; });
      else try { controller.enqueue(new TextEncoder().encode(line)); } catch { return; }
    }
    try { controller.close(); } catch {}
  } });
  return new Response(stream, { status });
};
"""
HELP = """
const say = (text) => { document.getElementById("input").value = text;
  document.getElementById("composer").requestSubmit(); };
const texts = (selector) => [...document.querySelectorAll(selector)].map((e) => e.textContent);
const isOver = () => document.getElementById("stop").hidden;
"""


def event(data) -> str:
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


def chunk(text: str, reason=None, **more) -> str:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason, **more}
    return event({"choices": [choice]})


def token(text: bytes, p: float, others=()) -> dict:
    spelled = text.decode("utf-8", "backslashreplace")
    top = [{"token": spelled, "logprob": math.log(p), "bytes": list(text)}]
    top += [{"token": o, "logprob": math.log(q), "bytes": list(o.encode())} for o, q in others]
    return {"token": spelled, "logprob": math.log(p), "bytes": list(text), "top_logprobs": top}


USAGE = event({"choices": [], "usage": {"completion_tokens": 2}})
END = [chunk("", "stop"), USAGE, event("[DONE]")]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def open_page(browser, tmp_path):
    """Return a function that opens the page beside the stand-in."""
    path = tmp_path / "page.html"  # another path is another session storage
    path.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    tabs = []

    def open_it(script: str = ""):
        tabs.append(browser.open(path.as_uri(), STAND_IN + HELP + script))
        tabs[-1].run("localStorage.clear()")
        return tabs[-1]

    yield open_it
    for tab in tabs:
        browser.call("Target.closeTarget", targetId=tab.target)


def prepare(tab, *lines, status=200):
    tab.run(f"answers.push({json.dumps({'status': status, 'lines': lines})}), 0")


def test_an_answer_is_streamed_and_what_it_spells_stays_text(open_page):
    tab = open_page()
    evil = "<script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
    prepare(tab, chunk(evil)[:30], chunk(evil)[30:], None, chunk(" end"), *END)
    tab.run("document.getElementById('input').focus()")
    tab.write(f"{evil}?")
    tab.press("Enter", 13, text="\r")
    tab.wait("texts('.assistant .body')[0]?.endsWith('>')")
    assert tab.run("texts('.body')") == [f"{evil}?", evil]
    assert not tab.run("isOver()")
    assert tab.run("document.getElementById('log').getAttribute('aria-busy')") == "true"
    tab.run("release()")
    tab.wait("isOver()")
    assert tab.run("texts('.body')")[1] == f"{evil} end"
    assert tab.run("texts('.foot span')")[0].startswith("2 tokens")
    assert tab.run("document.querySelectorAll('#log script, #log img').length") == 0
    assert not tab.run("window.evil")
    (asked,) = tab.run("requests")
    assert asked["path"] == "v1/chat/completions"
    assert asked["body"] == {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"{evil}?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_conversation_has_its_system_prompt_and_settings_and_is_forgotten(open_page):
    tab = open_page("window.models = ['a', 'b'];")
    values = {"system": "Be brief.", "temperature": "0.5", "top_p": "0.9", "max_tokens": "7",
              "seed": "3", "model": "b"}  # fmt: skip
    for name, value in values.items():
        tab.run(f"document.getElementById({name!r}).value = {value!r}")
    for text in ("one", "two"):
        prepare(tab, chunk(text.upper()), *END)
        tab.run(f"say({text!r})")
        tab.wait(f"isOver() && texts('.foot').length === {1 + (text == 'two')}")
    body = tab.run("requests.at(-1).body")
    assert [each["content"] for each in body.pop("messages")] == ["Be brief.", "one", "ONE", "two"]
    assert body == {"model": "b", "temperature": 0.5, "top_p": 0.9, "max_tokens": 7, "seed": 3,
                    "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    prepare(tab, chunk("other"), *END)
    tab.run("document.querySelector('.turn:last-child .again').click()")
    tab.wait("texts('.assistant .body')[1] === 'other' && isOver()")
    assert len(tab.run("requests.at(-1).body.messages")) == 4
    tab.run("location.reload()")
    tab.wait("document.readyState === 'complete' && texts('.body').length === 4")
    tab.run("document.getElementById('new').click()")
    assert tab.run("texts('.turn')") == []
    prepare(tab, chunk("x"), *END)
    tab.run("say('new')")
    tab.wait("isOver() && texts('.foot').length === 1")
    assert [each["content"] for each in tab.run("requests.at(-1).body.messages")] == ["new"]


def test_stop_keeps_what_has_come(open_page):
    tab = open_page()
    prepare(tab, chunk("half"), None, chunk("more"), *END)
    tab.run("say('go')")
    tab.wait("texts('.assistant .body')[0] === 'half'")
    tab.run("document.getElementById('stop').click()")
    tab.wait("isOver()")
    assert tab.run("texts('.assistant .body')") == ["half"]
    assert tab.run("texts('.foot span')") == ["stopped"]
    assert tab.run("document.getElementById('notice').hidden")


def test_errors_are_text_and_the_message_is_not_lost(open_page):
    tab = open_page()
    error = {"error": {"message": "<b>temperature</b> must be 0 to 2", "type": "x", "code": None}}
    prepare(tab, json.dumps(error), status=400)
    tab.run("say('hello')")
    tab.wait("!document.getElementById('notice').hidden")
    assert tab.run("texts('#notice-text')") == ["<b>temperature</b> must be 0 to 2 (HTTP 400)"]
    assert tab.run("texts('.turn').length") == 0
    assert tab.run("document.getElementById('input').value") == "hello"
    prepare(tab, chunk("begun"), event({"error": {"message": "the engine failed"}}))
    tab.run("say('hello')")
    tab.wait("!document.getElementById('notice').hidden && isOver()")
    assert tab.run("texts('#notice-text')") == ["the engine failed"]
    assert tab.run("texts('.assistant .body')") == ["begun"]
    prepare(tab, chunk("cut"))
    tab.run("say('hello')")
    tab.wait("texts('#notice-text')[0].includes('ended before')")


def test_a_key_is_asked_for_where_the_server_wants_one(open_page):
    tab = open_page("window.needsKey = true;")
    tab.wait("!document.getElementById('notice').hidden")
    assert tab.run("texts('#notice-text')") == ["no key (HTTP 401)"]
    assert tab.run("document.activeElement.id") == "key"
    tab.write("secret")
    tab.run("document.getElementById('key').blur()")
    tab.wait("document.getElementById('notice').hidden")
    assert tab.run("texts('#model-name')") == ["tiny"]
    prepare(tab, chunk("yes"), *END)
    tab.run("say('hello')")
    tab.wait("requests.length")
    assert tab.run("requests[0].headers.Authorization") == "Bearer secret"


def test_tokens_are_tinted_by_probability_and_name_their_alternatives(open_page):
    tab = open_page()
    tab.run("document.getElementById('probabilities').click()")
    tokens = [token(b"a", 0.9, [("b", 0.1)]), token("\u00e9".encode()[:1], 0.5),
              token("\u00e9".encode()[1:], 0.5), token(b"\n<i>", 0.2, [("c", 0.7)])]  # fmt: skip
    prepare(tab, chunk("a", logprobs={"content": tokens[:2]}), None,
            chunk("\u00e9\n<i>", logprobs={"content": tokens[2:]}), *END)  # fmt: skip
    tab.run("say('go')")
    tab.wait("texts('.token').length === 1")
    tab.run("release()")
    tab.wait("isOver()")
    body = tab.run("requests[0].body")
    assert (body["logprobs"], body["top_logprobs"]) == (True, 5)
    assert tab.run("texts('.token')") == ["a", "\u00e9", "\n<i>"]
    tints = tab.run("[...document.querySelectorAll('.token')].map((e) => e.style.background)")
    alphas = [float(each.rpartition(",")[2].strip(" )")) for each in tints]
    assert alphas == pytest.approx([0.65 * 0.1, 0.65 * 0.75, 0.65 * 0.8], abs=1e-3)
    tab.run("document.querySelector('.token').focus()")
    assert tab.run("texts('#tip span')") == ["a", "90%", "b", "10%"]
    tab.press("ArrowRight", 39)
    assert tab.run("texts('#tip strong')")[0].startswith("“\u00e9” 25% in 2 tokens")
    tab.press("End", 35)
    assert tab.run("document.activeElement.getAttribute('aria-label')") == "⏎<i>, 20%"
    assert tab.run("texts('#tip .chosen span')") == ["⏎<i>", "20%"]
    assert tab.run("document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1
    tab.press("Escape", 27)
    assert tab.run("document.getElementById('tip').hidden")
    tab.run("document.getElementById('probabilities').click()")
    assert tab.run("[texts('.token').length, texts('.assistant .body')[0]]") == [0, "a\u00e9\n<i>"]


def test_a_model_without_a_template_continues_the_text(open_page):
    tab = open_page()
    error = {"error": {"message": "there is no chat template: serve with --template chatml|plain"}}
    prepare(tab, json.dumps(error), status=400)
    prepare(tab, event({"choices": [{"text": " upon"}]}), *END)
    tab.run("say('Once')")
    tab.wait("texts('.assistant .body')[0] === ' upon' && isOver()")
    prepare(tab, event({"choices": [{"text": " time"}]}), *END)
    tab.run("document.getElementById('probabilities').checked = true, say(' a')")
    tab.wait("texts('.assistant .body')[1] === ' time' && isOver()")
    first, second = tab.run("requests.slice(1)")
    assert first["path"] == second["path"] == "v1/completions"
    assert (first["body"]["prompt"], second["body"]["prompt"]) == ("Once", "Once upon a")
    assert second["body"]["logprobs"] == 5
    assert tab.run("document.getElementById('system-label').hidden")


def test_the_page_and_the_server_belong_together(browser):
    service = make_played()
    with run_server(service) as address:
        tab = browser.open(f"{address.url}/", HELP)
        tab.wait("document.getElementById('model').options.length === 2")
        tab.run("document.getElementById('probabilities').click()")
        tab.run("say('hello')")
        wait_until(lambda: service.engine.handles)
        service.engine.handles[0]._put(piece("<b>"))
        tab.wait("texts('.token').length === 3")
        service.engine.handles[0]._put(piece("ye\u00e9", "eos"))
        tab.wait("isOver()")
        assert tab.run("texts('.assistant .body')") == ["<b>ye\u00e9"]
        assert tab.run("texts('.token')") == [*"<b>ye\u00e9"]
        assert tab.run("texts('.foot span')")[0].startswith("7 tokens")

        tab.run("say('go on')")
        wait_until(lambda: len(service.engine.handles) == 2)
        service.engine.handles[1]._put(piece("half"))
        tab.wait("texts('.assistant .body')[1] === 'half'")
        tab.run("document.getElementById('stop').click()")
        wait_until(lambda: service.engine.cancelled)  # the server notices
        tab.wait("texts('.foot span')[1] === 'stopped'")

        tab.run("document.getElementById('temperature').value = 5, say('hot')")
        tab.wait("texts('#notice-text')[0].includes('temperature')")
        assert "HTTP 400" in tab.run("texts('#notice-text')")[0]

        before = browser.list_pages()
        tab.run("document.querySelector('.foot button').click()")
        wait_until(lambda: len(browser.list_pages()) > len(before))
        (new,) = {*browser.list_pages()} - {*before}
        page = browser.attach(new)
        page.wait("document.querySelectorAll('#tokens button').length > 20")
        assert page.run("document.title").startswith("Inside")
        assert page.run("document.querySelectorAll('#heads button').length") == 8
        shown = page.run("[...document.querySelectorAll('#tokens button')].map(b => b.textContent)")
        assert "<b>ye" in "".join(shown)
        for target in (tab.target, new):
            browser.call("Target.closeTarget", targetId=target)
