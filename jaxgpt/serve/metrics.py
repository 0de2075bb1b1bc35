"""What a server counts, for Prometheus."""

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax

from jaxgpt.optional import require

if TYPE_CHECKING:
    from jaxgpt.serve.service import Service

USER = "jaxgpt serve"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

_compiles = [0]  # of the process


@functools.cache
def count_compiles() -> list[int]:
    """Return a list with the number of programs that were compiled since the first call."""

    def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
        _compiles[0] += event == COMPILE_EVENT

    jax.monitoring.register_event_duration_secs_listener(count)
    return _compiles


def get_device_bytes() -> int:
    """Return the memory in use on all devices, bytes; 0 where the platform does not report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return sum(each.get("bytes_in_use", 0) for each in stats)


def read_engine(name: str) -> Callable[["Service"], float]:
    """Return the function that reads an attribute of the engine; 0 without one."""
    return lambda service: getattr(service.engine, name, 0)


# What is read when the metrics are: name -> (type, help, value).
LIVE: dict[str, tuple[str, str, Callable[["Service"], float]]] = {
    "jaxgpt_ready": ("gauge", "1 if requests are taken", lambda s: s.state == "ready"),
    "jaxgpt_requests_running": ("gauge", "texts with a row of the engine", read_engine("running")),
    "jaxgpt_requests_waiting": ("gauge", "texts that wait for a row", read_engine("waiting")),
    "jaxgpt_rows": ("gauge", "rows of the engine", lambda s: s.rows),
    "jaxgpt_queue_capacity": ("gauge", "texts that may wait", lambda s: s.queue),
    "jaxgpt_slots_used": ("gauge", "tokens in the rows", read_engine("slots_used")),
    "jaxgpt_slots": ("gauge", "tokens that all rows hold", lambda s: s.slots),
    "jaxgpt_engine_step_seconds": (
        "gauge", "age of the step of the engine that runs now", read_engine("seconds_since_step")
    ),
    "jaxgpt_compiles": ("counter", "compiled programs", lambda s: count_compiles()[0]),
    "jaxgpt_device_memory_bytes": ("gauge", "memory in use", lambda s: get_device_bytes()),
}  # fmt: skip


class LiveCollector:
    """Reads the rows of LIVE."""

    def __init__(self, service: "Service"):
        self.service = service

    def collect(self) -> Iterator[Any]:
        """Yield the metrics."""
        require("prometheus_client", USER)
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        kinds = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
        for name, (kind, meaning, read) in LIVE.items():
            yield kinds[kind](name, meaning, value=float(read(self.service)))


class Metrics:
    """Counters and histograms of one server.

    Attributes:
        requests: by route and status.
        prompt_tokens, generated_tokens, reused_tokens: the last are those of prompts that the cache
            had.
        prefix_hits: prompts whose beginning the cache had.
        cancelled: texts whose client left.
        first_token, next_token, duration: seconds.
    """

    def __init__(self, service: "Service"):
        client = require("prometheus_client", USER)
        count_compiles()
        self.registry = client.CollectorRegistry()
        make = functools.partial(client.Counter, registry=self.registry)
        measure = functools.partial(client.Histogram, registry=self.registry)
        self.requests = make("jaxgpt_requests", "requests", ["route", "code"])
        self.prompt_tokens = make("jaxgpt_prompt_tokens", "tokens of prompts")
        self.generated_tokens = make("jaxgpt_generated_tokens", "tokens that were generated")
        self.reused_tokens = make("jaxgpt_prefix_tokens", "tokens of prompts found in the cache")
        self.prefix_hits = make("jaxgpt_prefix_hits", "prompts that begin like an earlier one")
        self.cancelled = make("jaxgpt_cancelled", "texts whose client left")
        self.first_token = measure(
            "jaxgpt_time_to_first_token_seconds", "from the request to its first token",
            buckets=SECONDS,
        )  # fmt: skip
        self.next_token = measure(
            "jaxgpt_time_per_token_seconds", "mean of a text's later tokens", buckets=TOKEN_SECONDS
        )
        self.duration = measure(
            "jaxgpt_request_seconds", "whole requests", ["route"], buckets=SECONDS
        )
        self.registry.register(LiveCollector(service))
        client.ProcessCollector(registry=self.registry)

    def format(self) -> bytes:
        """Return all metrics as text."""
        return require("prometheus_client", USER).generate_latest(self.registry)
