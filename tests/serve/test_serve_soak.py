"""A small dose of the soak, and what the benchmark of the server computes."""

import asyncio
import itertools
import os

import pytest
from serving import open_tiny

from benchmarks import serve
from tests.serve import soak


def test_random_clients_leave_nothing_behind():
    with open_tiny(rows=3, queue=6) as address:
        counts, states = asyncio.run(soak.run(address.port, os.getpid(), count=80, seed=1))
    sent = {kind for kind, _ in counts}
    assert {"answer", "stream", "bad request", "client left", "other"} <= sent
    assert counts["answer", 200] + counts["stream", 200] > 10
    assert [name for name, _ in states] == ["start", "end, idle"]
    assert "| bad request | 400 |" in soak.format_tables(counts, states)


def test_a_stream_that_is_not_whole_is_noticed():
    chunk = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": %s}]}\n\n'
    end = b"data: [DONE]\n\n"
    whole = chunk % b"null" + chunk % b'"stop"' + end
    assert soak.read_stream(whole) == [("aa", "stop")]
    for wrong in (chunk % b"null", chunk % b"null" + end, 2 * (chunk % b'"stop"') + end):
        with pytest.raises(AssertionError):
            soak.read_stream(wrong)


def test_what_is_left_at_the_end_is_noticed():
    start, fine = soak.State(100, 9, 20), soak.State(150, 12, 21)
    states = [("start", start), ("0.1 min", soak.State(130, 12, 40)), ("end, idle", fine)]
    soak.check_states(states)
    for leak in (soak.State(300, 12, 21), soak.State(150, 13, 21), soak.State(150, 12, 40)):
        with pytest.raises(AssertionError):
            soak.check_states([*states[:2], ("end, idle", leak)])


def test_figures_are_those_of_all_requests_together():
    times = [serve.Times(0, 1, 3, 5), serve.Times(1, 3, 5, 11), serve.Times(2, 5, 6, 2)]
    found = serve.summarize("tiny", 3, "server", times, refused=4)
    assert found.rate == 18 / 6
    assert (found.first_p50, found.first_p95) == (2, 3)
    assert (found.token_p50, found.token_p95) == (0.5, 1)
    median = serve.take_median([found, found, serve.summarize("tiny", 3, "server", times[:1], 0)])
    assert (median.rate, median.refused) == (3, 8)
    assert "| tiny | 3 | server | 3 | 2,000.0 ms, 3,000.0 ms |" in serve.format_table([found])


def test_prompts_begin_like_no_other():
    work = serve.split_work(3, itertools.count())
    assert [len(prompts) for prompts in work] == [2, 2, 2]
    starts = {serve.make_prompt(number)[:30] for number in range(500)}
    assert len(starts) == 500
