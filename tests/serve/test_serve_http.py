"""What a server refuses, and clients that leave; its engine is played by the test."""

import asyncio
import json
import threading
from http.client import HTTPConnection

import pytest
from serving import CHAT, USER, make_played, open_chat, piece, run_server, wait_until

from jaxgpt.generate import LongPromptError
from jaxgpt.serve import http, service
from jaxgpt.serve.errors import convert
from jaxgpt.serve.server import check_network, format_address, listen
from jaxgpt.settings import ConfigError

# --- who may ask ---


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", ""]
)
def test_a_host_that_is_not_this_server_is_refused(address, host):
    status, _, found = address.ask("/v1/models", Host=host)
    assert (status, found["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:80"])
def test_a_host_of_the_loopback_interface_is_served(address, host):
    assert address.ask("/v1/models", Host=host)[0] == 200


def test_a_host_that_is_listed_is_served():
    with run_server(make_played(), hosts=["models.example.org"]) as address:
        assert address.ask("/v1/models", Host="models.example.org")[0] == 200


def test_a_body_must_be_json_by_its_media_type(address):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, found = address.ask(CHAT, {"messages": USER}, Content_Type=kind)
        assert (status, found["error"]["code"]) == (415, "unsupported_media_type")


def test_a_key_is_compared_whole_and_the_page_needs_none():
    with run_server(make_played(), keys=["secret", "other"]) as address:
        for path in ("/v1/models", "/metrics"):
            for key in ("", "Bearer ", "Bearer secre", "Bearer secrets", "secret", "Basic secret"):
                status, headers, found = address.ask(path, Authorization=key)
                assert (status, found["error"]["code"]) == (401, "invalid_api_key")
                assert headers["WWW-Authenticate"] == "Bearer"
            for key in ("Bearer secret", "bearer other"):
                assert address.ask(path, Authorization=key)[0] == 200
        assert address.ask("/")[0] == address.ask("/health")[0] == 200
        assert address.ask(CHAT, {"messages": USER})[0] == 401


def test_keys_are_compared_in_a_time_that_does_not_depend_on_them(monkeypatch):
    seen = []
    monkeypatch.setattr(http.hmac, "compare_digest", lambda a, b: seen.append((a, b)) or a == b)
    http.check_key({b"authorization": b"Bearer b"}, ["b", "c"])
    assert seen == [(b"b", b"b"), (b"b", b"c")]


def test_another_site_reads_nothing_unless_it_is_listed():
    site = "https://example.org"
    asked = {"Origin": site, "Access_Control_Request_Method": "POST"}
    with run_server(make_played()) as address:
        assert "Access-Control-Allow-Origin" not in address.ask("/v1/models", Origin=site)[1]
        status, headers, _ = address.ask(CHAT, method="OPTIONS", **asked)
        assert status == 405
        assert "Access-Control-Allow-Origin" not in headers
    with run_server(make_played(), origins=[site], keys=["k"]) as address:
        assert address.ask("/v1/models", Origin=site)[1]["Access-Control-Allow-Origin"] == site
        status, headers, _ = address.ask(CHAT, method="OPTIONS", **asked)
        assert (status, headers["Access-Control-Allow-Origin"]) == (200, site)
        other = address.ask("/v1/models", Origin="https://evil.example")[1]
        assert "Access-Control-Allow-Origin" not in other


def test_others_reach_a_server_only_with_a_key():
    for host in ("0.0.0.0", "192.168.1.5", "::"):
        with pytest.raises(ConfigError, match="give --api-key KEY"):
            check_network(host, [])
        check_network(host, ["key"])
    for host in ("127.0.0.1", "localhost", "::1"):
        check_network(host, [])


def test_a_port_that_is_taken_is_an_error():
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert format_address(sock) == f"http://127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"--port {port}: Address already in use"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="--host"):
        listen("no.such.host.invalid", 0)


# --- bodies ---


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(address, is_chunked):
    data = b'{"messages": "' + b"x" * http.MAX_BODY_BYTES + b'"}'
    body = iter([data[: 2**20], data[2**20 :]]) if is_chunked else data
    connection = HTTPConnection(address.host, address.port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", CHAT, body, headers, encode_chunked=is_chunked)
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "body_too_large"
    connection.close()


def test_a_body_that_does_not_come_is_given_up(address, monkeypatch):
    monkeypatch.setattr(http, "BODY_SECONDS", 0.05)
    connection = HTTPConnection(address.host, address.port, timeout=60)
    connection.putrequest("POST", CHAT)
    for name, value in {"Content-Type": "application/json", "Content-Length": "9"}.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 408
    connection.close()


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b'"a"', b"\xff", b'{"messages": NaN}', b"[" * 99999, b"1" * 9999]
)
def test_a_body_that_is_no_object_of_json_is_refused(address, data):
    status, _, found = address.ask(CHAT, data)
    assert (status, found["error"]["type"]) == (400, "invalid_request_error")


def test_paths_and_methods_that_are_not_there_have_the_shape_of_errors(address):
    status, _, found = address.ask("/v1/chat", {})
    assert (status, found["error"]["code"]) == (404, "not_found")
    status, headers, found = address.ask(CHAT)
    assert (status, headers["Allow"]) == (405, "POST")
    assert found["error"]["code"] == "method_not_allowed"
    assert address.ask("/health", {}, method="POST")[0] == 405


# --- streams ---


def test_a_stream_has_a_role_then_content_then_one_reason_then_usage_then_done(address, engine):
    options = {"stream_options": {"include_usage": True}}
    stream, handle = open_chat(address, **options)
    handle._put(piece("Hé"))
    handle._put(piece("", ""))
    handle._put(piece("llo", "eos"))
    events = stream.list_events()
    assert events.pop() == "data: [DONE]"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    usage = events.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    assert all(event["usage"] is None for event in events)
    choices = [event["choices"][0] for event in events]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""}, {"content": "Hé"}, {"content": "llo"}, {},
    ]  # fmt: skip
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]


@pytest.mark.parametrize(
    ("ending", "reason"),
    [("eos", "stop"), ("stop", "stop"), ("tokens", "length"), ("context", "length")],
)
def test_the_reason_is_that_of_the_engine(address, engine, ending, reason):
    stream, handle = open_chat(address)
    handle._put(piece("a", ending))
    reasons = [e["choices"][0]["finish_reason"] for e in stream.list_events()[:-1]]
    assert reasons == [None, None, reason]


def test_an_error_in_a_stream_is_its_last_event_and_tells_nothing(address, engine, capfd):
    stream, handle = open_chat(address)
    handle._put(piece("a"))
    handle._put(RuntimeError("the prompt was: hello"))
    *_, last = stream.list_events()
    assert last["error"]["code"] == "internal_error"
    assert "hello" not in json.dumps(last) + capfd.readouterr().err
    stream, handle = open_chat(address)
    handle._put(ConfigError("sample.json_schema cannot be followed"))
    assert stream.list_events()[-1]["error"]["message"] == "response_format cannot be followed"


def test_an_error_of_the_engine_is_a_status_of_500_and_no_prompt_is_logged(address, engine, capfd):
    found = []
    thread = threading.Thread(target=lambda: found.append(address.ask(CHAT, {"messages": USER})))
    thread.start()
    wait_until(lambda: engine.handles)
    engine.handles[0]._put(RuntimeError("the prompt was: hello"))
    thread.join(60)
    assert found[0][0] == 500
    shown = capfd.readouterr().err + "".join(address.lines)
    assert "RuntimeError in a request" in shown
    assert "hello" not in shown + json.dumps(found[0][2])


def test_a_stream_shows_that_it_is_alive_while_nothing_comes(address, engine, monkeypatch):
    monkeypatch.setattr("jaxgpt.serve.choices.PING_SECONDS", 0.01)
    stream, handle = open_chat(address)
    assert stream.read()["choices"]
    assert [stream.read(), stream.read()] == [": wait", ": wait"]
    handle._put(piece("a", "eos"))
    assert stream.list_events()[-1] == "data: [DONE]"


def test_the_texts_of_a_client_that_leaves_are_cancelled(address, engine):
    streams = [open_chat(address, n=2)[0] for _ in range(2)]
    for handle in engine.handles:
        handle._put(piece("a"))
    for stream in streams:
        stream.read()
        stream.close()
    wait_until(lambda: len(engine.cancelled) == 4)
    assert set(map(id, engine.cancelled)) == set(map(id, engine.handles))


def test_the_text_of_a_client_that_leaves_before_its_answer_is_cancelled(address, engine):
    connection = HTTPConnection(address.host, address.port)
    body = json.dumps({"messages": USER}).encode()
    connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    wait_until(lambda: engine.handles)
    assert not engine.cancelled
    connection.close()
    wait_until(lambda: engine.cancelled)


# --- limits ---


def test_a_full_queue_is_an_error_that_says_when_to_come_back(address, engine):
    streams = [open_chat(address)[0] for _ in range(4)]  # two rows, two wait
    status, headers, found = address.ask(CHAT, {"messages": USER})
    assert (status, found["error"]["code"]) == (429, "queue_full")
    assert found["error"]["type"] == "rate_limit_error"
    assert 1 <= int(headers["Retry-After"]) <= 60
    engine.handles[0]._put(piece("a", "eos"))
    streams[0].list_events()
    late, handle = open_chat(address)
    handle._put(piece("b", "eos"))
    assert late.list_events()[-1] == "data: [DONE]"
    for stream in streams[1:]:
        stream.close()
    status, _, found = address.ask(CHAT, {"messages": USER, "n": 5})
    assert (status, found["error"]["param"]) == (400, "n")


def test_slow_work_waits_for_its_turn_and_not_without_end(monkeypatch):
    monkeypatch.setattr(service, "MAX_SLOW", 1)

    async def run():
        runner, event = service.SerialRunner("test"), threading.Event()
        first = asyncio.ensure_future(runner.run(event.wait))
        await asyncio.sleep(0)
        with pytest.raises(service.RequestError, match="1 requests wait") as error:
            await runner.run(event.wait)
        event.set()
        await first
        runner.close()
        return error.value.status

    assert asyncio.run(run()) == 429


def test_errors_of_the_library_become_those_of_requests():
    assert convert(LongPromptError("x")).code == "context_length_exceeded"
    assert convert(ConfigError("sample.top_k=-1")).message == "top_k=-1"
    assert convert(OSError("/secret")).message == "the server failed to answer this request."
