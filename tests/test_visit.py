"""A visit computes what is asked for, once; collectors travel together and come apart."""

import jax
import jax.numpy as jnp

import backhand as bh
from backhand.visit import Visit, apart, together
from tests.support import assert_close, normal


def visit_of(x, dy, calls):
    def rule(params, residuals, dy):
        calls.append(1)
        return {"w": bh.Outer(residuals, dy), "b": None}, dy @ params["w"].T

    params = {"w": normal(2, x.shape[1], dy.shape[1]), "b": jnp.ones(3)}
    return Visit(params, x, dy, rule)


def test_a_rule_runs_when_asked_and_once():
    x, dy, calls = normal(0, 5, 2), normal(1, 5, 4), []
    visit = visit_of(x, dy, calls)
    assert (visit.residuals is x, visit.dy is dy, calls) == (True, True, [])
    assert_close(visit.dparams["w"], x.T @ dy, 1e-5)
    assert_close(visit.dx, dy @ visit.params["w"].T, 1e-5)
    assert visit.dparams is visit.dparams
    assert isinstance(visit.contributions["w"], bh.Outer)
    assert calls == [1]


def test_no_contribution_is_a_gradient_of_zero():
    visit = visit_of(normal(0, 5, 2), normal(1, 5, 4), [])
    assert_close(visit.dparams["b"], jnp.zeros(3), 0)


def test_a_frozen_visit_keeps_the_error_and_loses_the_gradient():
    visit = visit_of(normal(0, 5, 2), normal(1, 5, 4), [])
    frozen = visit.frozen()
    assert frozen.contributions == {"w": None, "b": None}
    assert_close(frozen.dparams, jax.tree.map(jnp.zeros_like, visit.params), 0)
    assert frozen.dx is visit.dx


def test_a_running_statistic_counts_as_one_parameter():
    running = bh.Running(jnp.zeros(2), jnp.ones(2))
    moments = bh.Moments(jnp.ones(()), jnp.ones(2), jnp.ones(2))
    visit = Visit({"r": running}, (), (), lambda *args: ({"r": moments}, None))
    assert_close(visit.dparams, {"r": bh.Running(jnp.zeros(2), jnp.zeros(2))}, 0)
    assert visit.frozen().contributions == {"r": None}


def test_collectors_come_apart_as_if_each_had_been_alone():
    collectors = {
        "gradients": bh.gradients,
        "blame": bh.Collector(lambda visit: jnp.sum(visit.dy)),
        "nothing": bh.Collector(lambda visit: None),
    }
    visit = visit_of(normal(0, 5, 2), normal(1, 5, 4), [])
    collected, dx = together(collectors)(visit)
    tree = {"layer": collected, "empty": ()}
    assert_close(apart(tree, "gradients"), {"layer": visit.dparams, "empty": ()}, 0)
    assert_close(apart(tree, "blame")["layer"], jnp.sum(visit.dy), 0)
    assert apart(tree, "nothing") == {"layer": None, "empty": ()}
    assert dx is visit.dx
