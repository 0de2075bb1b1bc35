import dataclasses

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import config, random_batch

from jaxgpt.config import ModelConfig
from jaxgpt.model import abstract_params, build
from jaxgpt.trainer import speed
from jaxgpt.trainer.speed import Clock, flops_per_token, peak_flops
from jaxgpt.trainer.step import compute_gradient


def test_flops_of_a_small_model_equal_a_count_by_hand():
    # Per layer: queries and out 4*4 each, keys and values 4*2 each, three maps of 4*6; the scores
    # 5*4; attention 2 products of [1 4] with [4 T] a layer; 6 and 12 for forward and backward.
    cfg = ModelConfig(
        vocab=260, context=8, width=4, layers=3, heads=2, kv_heads=1, ffn=6, position="rope"
    )
    matrices = 3 * (16 + 16 + 8 + 8 + 3 * 24) + 260 * 4
    assert flops_per_token(cfg) == 6 * matrices + 12 * 3 * 4 * 8


def test_a_matrix_that_is_not_trained_has_no_gradient_of_its_own():
    cfg = ModelConfig(
        vocab=260, context=8, width=4, layers=3, heads=2, kv_heads=1, ffn=6, position="rope"
    )
    blocks, attention = 3 * (16 + 16 + 8 + 8 + 3 * 24), 12 * 3 * 4 * 8
    matrices = blocks + 260 * 4
    assert flops_per_token(cfg, ("*",)) == flops_per_token(cfg)
    for patterns, trained in ((("stack.layers",), blocks), (("*.scale",), 0)):
        expected = 4 * matrices + 2 * trained + attention
        assert flops_per_token(cfg, patterns) == pytest.approx(expected, rel=1e-9)


def test_untied_and_tied_heads_have_the_same_flops():
    cfg = config().model
    assert flops_per_token(cfg) == flops_per_token(dataclasses.replace(cfg, tie=False))


def test_flops_are_close_to_the_compilers_count():
    # One layer, since the compiler counts the body of a scan once. It also counts the softmax,
    # norms and masks, which we leave out, and both masked halves of attention, which we keep:
    # at width 64 the elementwise part is some tenths of the products.
    cfg = config("model.layers=1", "model.width=64", "model.ffn=256", "model.kv_heads=none")
    params, _ = abstract_params(cfg.model)
    batch = jax.tree.map(jnp.asarray, random_batch())
    model = build(cfg.model)
    compiled = jax.jit(lambda p, b: compute_gradient(model, cfg.train, p, b, None)).lower(
        params, batch
    )
    counted = compiled.compile().cost_analysis()["flops"] / batch.tokens.size
    assert 0.95 < counted / flops_per_token(cfg.model) < 1.3


class Chip:
    platform = "gpu"

    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla T4", 65e12),
        ("TPU v6 lite", 918e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
    ],
)
def test_known_chips_have_the_peak_of_the_table(kind, peak):
    assert peak_flops([Chip(kind)] * 4)[0] == 4 * peak


def test_virtual_devices_of_one_cpu_are_counted_once(monkeypatch):
    monkeypatch.setattr(speed, "measure_matmul_flops", lambda device: 7e9)
    rate, source = peak_flops(jax.devices())
    assert rate == 7e9
    assert "measured" in source


def test_an_unknown_accelerator_is_measured_and_multiplied(monkeypatch):
    monkeypatch.setattr(speed, "measure_matmul_flops", lambda device: 7e9)
    assert peak_flops([Chip("Novel 9000")] * 4)[0] == 28e9


@pytest.fixture
def advance(monkeypatch):
    """advance(s) advances the clock by s seconds."""
    now = [100.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def forward(seconds):
        now[0] += seconds

    return forward


def test_the_clock_does_not_count_pauses(advance):
    clock = Clock()
    clock.start(0)
    advance(6.0)
    assert clock.pause() == 6.0
    advance(50.0)  # an evaluation
    clock.start(3)
    advance(4.0)
    assert clock.pause() == 4.0


def test_the_clock_returns_the_mean_of_the_steps_since_the_last_call(advance):
    clock = Clock()
    clock.start(0)
    advance(6.0)
    assert clock.seconds_per_step(3) == 2.0
    advance(5.0)
    assert clock.seconds_per_step(8) == 1.0
    advance(50.0)
    clock.start(8)
    advance(3.0)
    assert clock.seconds_per_step(9) == 3.0
    assert clock.seconds_per_step(9) is None
