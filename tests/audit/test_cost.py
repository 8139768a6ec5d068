"""Costs are counted by XLA, by name where the rule gives names, and measured in turn."""

import jax
import jax.numpy as jnp

import backhand as bh
from backhand.audit.cost import (
    Programs,
    automatic_residuals,
    cost,
    flops,
    manual_residuals,
    medians,
)
from backhand.audit.runs import Runs
from backhand.audit.subjects import subject_of
from tests.support import normal

ARGS = normal(0, 8, 16), normal(1, 16), normal(2, 16)


def test_both_sides_have_every_figure():
    found = cost(Runs(subject_of(bh.ops.layer_norm, ARGS)))
    for side in (found.manual, found.automatic):
        assert side.milliseconds > 0
        assert side.flops > 8 * 16
        assert side.temporary_bytes >= 0
    assert found.manual.residual_bytes == {
        "x": 512,
        "mean": 32,
        "rstd": 32,
        "scale": 64,
        "offset": 64,
    }
    assert found.residual_ratio < 1


def test_what_jax_keeps_has_shapes_for_names():
    runs = Runs(subject_of(jnp.sin, ARGS[:1], jnp.sin))
    assert automatic_residuals(runs) == {"float32[8,16]": 512}
    assert manual_residuals(runs) == {"float32[8,16]": 512}


def test_programs_that_compile_beside_are_those_that_are_measured():
    runs = Runs(subject_of(bh.ops.tanh, ARGS[:1]))
    with Programs(runs) as programs:
        measured = cost(runs, programs)
        assert [flops(program) for program in programs.compiled()] == [
            measured.manual.flops,
            measured.automatic.flops,
        ]


def test_without_a_reference_there_is_nothing_to_measure():
    assert cost(Runs(subject_of(lambda x: x, ARGS[:1]))) is None


def test_calls_are_taken_in_turn():
    order = []
    times = medians([lambda: order.append("a"), lambda: order.append("b")])
    assert len(times) == 2
    assert order[:6] == ["a", "b", "a", "b", "a", "b"]
    assert order.count("a") == order.count("b") >= 4


def test_a_backend_that_does_not_say_leaves_a_gap():
    class Silent:
        def cost_analysis(self):
            raise NotImplementedError

    assert flops(Silent()) is None
    assert flops(jax.jit(jnp.square).lower(jnp.ones(4)).compile()) == 4
