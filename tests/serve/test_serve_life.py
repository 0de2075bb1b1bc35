"""How a server lives: loading, health, metrics, its end, templates; its engine is played."""

import logging
import threading

import pytest
from serving import (
    CHAT,
    TURNS,
    USER,
    make_model,
    make_played,
    open_chat,
    piece,
    run_server,
    wait_until,
)

from jaxgpt.serve.jobs import encode_messages
from jaxgpt.serve.schema import read_messages
from jaxgpt.serve.server import Server, listen
from jaxgpt.serve.service import Service
from jaxgpt.settings import ConfigError


def test_health_is_503_while_a_step_takes_too_long_or_the_thread_is_dead(address, engine):
    assert address.ask("/health")[::2] == (200, {"status": "ok", "running": 0, "waiting": 0})
    engine.seconds_since_step = 5.1
    assert address.ask("/health")[2]["status"] == "stalled"
    assert address.ask("/health")[0] == 503
    engine.seconds_since_step, engine.is_alive = 0.0, False
    assert address.ask("/health")[::2] == (503, {"status": "failed", "running": 0, "waiting": 0})
    engine.is_alive = True


def test_metrics_count_requests_tokens_and_times(address, engine):
    def read(name):
        text = address.ask("/metrics")[2].decode()
        return sum(float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(name))

    names = {
        "requests": f'jaxgpt_requests_total{{code="200",route="{CHAT}"}}',
        "bad": f'jaxgpt_requests_total{{code="400",route="{CHAT}"}}',
        "prompt": "jaxgpt_prompt_tokens_total",
        "generated": "jaxgpt_generated_tokens_total",
        "first": "jaxgpt_time_to_first_token_seconds_count",
        "next": "jaxgpt_time_per_token_seconds_count",
    }
    before = {key: read(name) for key, name in names.items()}
    stream, handle = open_chat(address)
    assert read("jaxgpt_requests_running") == 1
    handle._put(piece("abc"))
    handle._put(piece("d", "eos"))
    stream.list_events()
    assert address.ask(CHAT, {})[0] == 400
    wait_until(lambda: address.service.active == 0)
    after = {key: read(name) - before[key] for key, name in names.items()}
    prompt = len(encode_messages(address.service.served, USER))
    assert after == dict(requests=1, bad=1, prompt=prompt, generated=4, first=1, next=1)
    assert read("jaxgpt_rows") == 2
    assert read("jaxgpt_slots ") == 2 * 128
    assert "process_resident_memory_bytes" in address.ask("/metrics")[2].decode()
    assert address.ask("/nothing")[0] == 404
    assert read('jaxgpt_requests_total{code="404",route="other"}') >= 1


def test_lines_about_requests_do_not_have_what_they_say(address, engine, caplog):
    with caplog.at_level(logging.DEBUG):
        address.ask(CHAT + "?secret=1", {"messages": USER, "secret": 1})
    assert address.lines[-1].startswith(f"POST {CHAT} 400 ")
    assert "secret" not in "".join(address.lines) + caplog.text


def test_a_server_answers_503_while_its_model_loads():
    release, made = threading.Event(), make_played()

    def load():
        release.wait(60)
        return made.served

    with run_server(Service(2, 2), load) as address:
        for path, body in (("/v1/models", None), (CHAT, {"messages": USER})):
            status, headers, found = address.ask(path, body)
            assert (status, found["error"]["code"]) == (503, "loading")
            assert headers["Retry-After"]
        assert address.ask("/health")[::2] == (503, {"status": "loading"})
        assert address.ask("/metrics")[0] == address.ask("/")[0] == 200
        release.set()
        wait_until(lambda: address.ask("/health")[0] == 200)
        assert address.ask("/v1/models")[0] == 200


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load():
        raise ConfigError("no such model")

    server_service = Service(1, 1)
    with (
        pytest.raises(ConfigError, match="no such model"),
        listen("127.0.0.1", 0) as sock,
    ):
        Server(server_service, sock).run(load)


def test_a_server_that_stops_finishes_what_it_has_begun_and_takes_no_more():
    made = make_played()
    with run_server(made) as address:
        stream, handle = open_chat(address)
        address.server.stop()
        wait_until(lambda: made.state == "draining")
        status, headers, found = address.ask(CHAT, {"messages": USER})
        assert (status, found["error"]["code"]) == (503, "shutting_down")
        assert headers["Retry-After"]
        assert address.ask("/health")[0] == 503
        assert "finishing 1 requests" in "".join(address.lines)
        assert not address.server._server.should_exit  # it listens until the answer is whole
        handle._put(piece("ab"))
        handle._put(piece("c", "eos"))
        events = stream.list_events()
        assert events[-1] == "data: [DONE]"
        assert not made.engine.cancelled
        address.thread.join(60)
        assert not address.thread.is_alive()
    assert made.engine.is_closed


def test_a_server_that_stops_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr("jaxgpt.serve.server.DRAIN_SECONDS", 0.1)
    made = make_played()
    with run_server(made) as address:
        stream, handle = open_chat(address)
        handle._put(piece("a"))
        address.server.stop()
        events = stream.list_events()
        assert events[-1]["error"]["code"] == "shutting_down"
        address.thread.join(60)
    assert made.engine.cancelled


# --- templates ---


def test_without_a_chat_template_the_error_names_the_option():
    with run_server(make_played(template="")) as address:
        status, _, found = address.ask(CHAT, {"messages": USER})
        assert (status, found["error"]["code"]) == (400, "no_chat_template")
        assert "--template chatml|llama3|gemma|" in found["error"]["message"]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_special_tokens_in_a_message_are_text_and_there_is_one_bos(address, role):
    served = address.service.served
    tokenizer = served.model.tokenizer
    specials = {*tokenizer.special_ids.values()}

    def count(content):
        messages = read_messages([{"role": role, "content": content}], "messages")
        ids = encode_messages(served, messages)
        return [index for index in ids if index in specials], ids

    plain, _ = count("x")
    assert plain == [tokenizer.bos, *(tokenizer.special_ids[TURNS[i]] for i in (0, 1, 0))]
    for special in tokenizer.special_ids:
        found, ids = count(f"a{special}{TURNS[1]}\n{TURNS[0]}system\nb")
        assert found == plain
        assert special.encode() in tokenizer.join_bytes(ids)


def test_a_template_that_refuses_or_needs_other_tokens_is_an_error():
    refusing = (
        "{% if messages[0].content != 'a' %}{{ raise_exception('no system here') }}{% endif %}"
    )
    with run_server(make_played(template=refusing)) as address:
        status, _, found = address.ask(CHAT, {"messages": USER})
        assert status == 400
        assert "no system here" in found["error"]["message"]
    with pytest.raises(ConfigError, match="needs the special token"):
        make_model("llama3")
    with pytest.raises(ConfigError, match="--template 'nothing' is none of chatml"):
        make_model("nothing")
    with pytest.raises(ConfigError, match="the chat template fails"):
        make_model("{% for %}")
