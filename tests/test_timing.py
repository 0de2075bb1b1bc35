"""The time to the first token and the decoding rate, without compilation."""

from jaxgpt.timing import CompileClock, SpeedMeter


class Clock:
    time = 0.0

    def __call__(self):
        return self.time


def test_the_first_part_the_rest_and_compilation_are_apart():
    now, compiled = Clock(), Clock()
    meter = SpeedMeter(now, compiled)
    now.time, compiled.time = 5.5, 5.0
    meter.mark(16)
    now.time = 6.5
    meter.mark(100)
    now.time, compiled.time = 9.5, 7.0  # a second program was compiled
    meter.mark(100)
    assert meter.marks == [(0.5, 16), (1.0, 100), (1.0, 100)]
    assert meter.format() == (
        "216 tokens: the first in 0.50 s, then 100 tokens/s; compilation 7.0 s"
    )


def test_a_single_part_has_no_rate():
    now = Clock()
    meter = SpeedMeter(now, Clock())
    now.time = 0.25
    meter.mark(8)
    assert meter.format() == "8 tokens in 0.25 s"


def test_a_part_of_a_compilation_inside_another_is_counted_once():
    now = Clock()
    clock = CompileClock(now)
    for end, duration in ((2, 1), (4, 1), (5, 5), (6, 0.5), (7, 2)):
        now.time = end
        clock.add("/jax/core/compile/jaxpr_trace_duration", duration)
    clock.add("/jax/other", 100)
    assert clock.seconds == 7  # [0 5] and [5 7]
