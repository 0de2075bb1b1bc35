"""Requests of many threads: streams, cancellation, and errors that stay where they belong."""

import dataclasses
import threading

import engine_soak
import pytest
from engine_cases import CFG, DRAWN, GREEDY, PARAMS, TOKENIZER, make_engine, recompute

import jaxgpt.engine.engine as engine_module
from jaxgpt.config import Config, ConfigError
from jaxgpt.engine.worker import EngineBusyError, EngineWorker
from jaxgpt.language_model import LanguageModel

MODEL = LanguageModel(Config(model=CFG), PARAMS, TOKENIZER)
PROMPTS = ["hello", "", "a text of thirty-seven characters, ok", "x" * 50]
LONG = dataclasses.replace(DRAWN, tokens=50)


@pytest.fixture(scope="module")
def worker():
    with MODEL.start_engine(rows=3, chunk=16) as worker:
        yield worker
    assert not worker.is_alive


def test_requests_of_many_threads_get_the_tokens_of_a_row_alone(worker):
    results: dict[int, tuple] = {}

    def run(n):
        handle = worker.submit(PROMPTS[n % 4], DRAWN, index=n)
        pieces = list(handle)
        results[n] = tuple(token for piece in pieces for token in piece.tokens)
        assert pieces[-1].ending
        assert not any(piece.ending for piece in pieces[:-1])

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for n in range(8):
        assert list(results[n]) == recompute(PROMPTS[n % 4], DRAWN, n)
    assert (worker.waiting, worker.running) == (0, 0)


def test_a_cancelled_request_ends_and_the_others_go_on(worker):
    cancelled, other = worker.submit("hello", LONG), worker.submit("hello", GREEDY)
    cancelled.cancel()
    cancelled.cancel()
    assert list(cancelled)[-1].ending == "cancelled"
    assert list(other.result().tokens) == recompute("hello", GREEDY)


def test_pieces_are_forwarded_in_order_those_that_came_before_too(worker):
    early, late = worker.submit("hello", GREEDY), worker.submit("hello", GREEDY)
    late.result()  # the other one has pieces that wait
    found, is_over = [], threading.Event()

    def receive(piece):
        found.append(piece)
        if piece.ending:
            is_over.set()

    early.forward(receive)
    assert is_over.wait(60)
    assert [token for piece in found for token in piece.tokens] == recompute("hello", GREEDY)


def test_a_step_that_takes_long_is_seen_and_idle_time_is_none(worker, monkeypatch):
    has_begun, may_go_on, decode = threading.Event(), threading.Event(), engine_module.decode

    def wait(*args, **kwargs):
        has_begun.set()
        may_go_on.wait(60)
        return decode(*args, **kwargs)

    worker._heartbeat -= 100
    assert worker.seconds_since_step == 0  # nothing to do
    monkeypatch.setattr(engine_module, "decode", wait)
    handle = worker.submit("hello", GREEDY)
    assert has_begun.wait(60)
    assert worker.seconds_since_step < 50
    worker._heartbeat -= 100
    assert worker.seconds_since_step > 50
    may_go_on.set()
    assert handle.result().ending
    later = worker.submit("hello", GREEDY)
    later.result()
    assert worker.seconds_since_step < 50


def test_a_bad_request_is_refused_where_it_is_made(worker):
    with pytest.raises(ConfigError, match="71 tokens"):
        worker.submit("x" * 70, GREEDY)
    with pytest.raises(ConfigError, match="token 999"):
        worker.submit("a", GREEDY, bias={999: 1.0})
    assert worker.submit("a", GREEDY).result().ending


def test_an_error_of_a_program_fails_its_requests_and_not_the_thread(worker, monkeypatch):
    def fail(*args, **kwargs):
        monkeypatch.undo()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine_module, "decode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        worker.submit("hello", GREEDY).result()
    assert list(worker.submit("hello", GREEDY).result().tokens) == recompute("hello", GREEDY)


def test_an_engine_that_cannot_go_on_fails_its_requests_and_takes_no_more(monkeypatch):
    worker = make_worker()

    def fail(*args, **kwargs):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(engine_module, "decode", fail)
    monkeypatch.setattr(engine_module, "init_state", fail)
    with pytest.raises(RuntimeError, match="the device is lost"):
        worker.submit("hello", GREEDY).result()
    worker._thread.join(60)
    assert not worker.is_alive
    with pytest.raises(EngineBusyError):
        worker.submit("hello", GREEDY)


def make_worker(max_waiting=9):
    from engine_cases import make_row_request

    return EngineWorker(lambda: make_engine(is_interactive=True), make_row_request, max_waiting)


def test_a_worker_that_drains_finishes_what_it_has_and_takes_no_more():
    worker = make_worker()
    handles = [worker.submit("hello", GREEDY) for _ in range(5)]
    worker.close(drain=True)
    assert [handle.result().ending for handle in handles] == ["tokens"] * 5
    with pytest.raises(EngineBusyError, match="shutting down"):
        worker.submit("hello", GREEDY)


def test_a_worker_that_closes_cancels_what_it_has():
    worker = make_worker()
    handles = [worker.submit("hello", LONG) for _ in range(6)]
    worker.close()
    endings = {handle.result().ending for handle in handles}
    assert "cancelled" in endings
    assert not worker.is_alive


def test_no_more_requests_wait_than_allowed():
    worker = make_worker(max_waiting=2)

    def submit_many():
        for _ in range(50):
            worker.submit("hello", LONG)

    with worker, pytest.raises(EngineBusyError, match="2 requests wait"):
        submit_many()


def test_an_engine_that_cannot_be_made_raises_in_the_caller():
    def fail():
        raise ConfigError("no such shape")

    with pytest.raises(ConfigError, match="no such shape"):
        EngineWorker(fail, lambda: None)


def test_a_short_soak_leaves_nothing_behind():
    counts = engine_soak.run(count=60, seed=2)
    assert min(counts.values()) > 0
