"""Several objectives of one set of parameters are one objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_close, assert_gradients_agree, normal, spread

BATCH = 6
MODEL = bh.chain(bh.dense(4), bh.tanh(), bh.dense(2))
SQUARED = bh.objective(MODEL, bh.losses.mean_squared_error)
ABSOLUTE = bh.objective(MODEL, bh.losses.mean_absolute_error)


def weigh(name, power):
    """A mean of squares to a power of the weights, so that each objective has its own weight."""
    squared = bh.losses.mean_squared_error

    def given(weights):
        return jnp.ones(BATCH) if weights is None else weights**power

    return bh.objective(
        MODEL,
        bh.Loss(
            name,
            lambda p, t, w: squared.forward(p, t, given(w)),
            lambda residuals, dy: (squared.backward(residuals, dy)[0], None, None),
            lambda p, t, w: squared.reference(p, t, given(w)),
        ),
    )


def regression(weights=None):
    data = {"inputs": normal(0, BATCH, 3), "targets": normal(1, BATCH, 2)}
    return data if weights is None else {**data, "weights": jnp.asarray(weights, float)}


def start(objective, data):
    return spread(objective.init(jax.random.key(0), data))


def test_the_loss_is_the_weighted_sum_of_the_losses(x64):
    both = bh.combine({"l2": SQUARED, "l1": ABSOLUTE}, {"l2": 1.0, "l1": 0.1})
    data = regression([1, 0, 2, 1, 0.5, 3])
    params = start(both, data)
    assert_close(both(params, data), SQUARED(params, data) + 0.1 * ABSOLUTE(params, data))
    assert_gradients_agree(both, params, data)


def test_each_objective_is_divided_by_its_own_weight_in_any_split(x64):
    first, second = weigh("first", 1), weigh("second", 3)
    both = bh.combine({"a": first, "b": second}, {"a": 2.0, "b": -0.5})
    data = regression([1, 0, 2, 1, 0.5, 3])
    params = start(both, data)

    def truth(params):
        return 2.0 * first(params, data) - 0.5 * second(params, data)

    for micro_batches in (1, 2, 4):
        for gradients in ("manual", "automatic"):
            evaluation = bh.value_and_grad(both, gradients=gradients)
            ours = jax.jit(bh.accumulate(evaluation, micro_batches))(params, data)
            assert_close(ours, jax.value_and_grad(truth)(params))


def test_every_loss_and_metric_is_reported_by_name(x64):
    accurate = bh.objective(
        MODEL,
        bh.losses.mean_squared_error,
        metrics={"largest": lambda p, t, w=None: bh.metrics.Max(jnp.max(p))},
    )
    both = bh.combine({"l2": accurate, "l1": ABSOLUTE}, {"l2": 1.0, "l1": 0.1})
    data = regression()
    params = start(both, data)
    terms, _ = bh.accumulate(bh.value_and_grad(both), 3).evaluate(params, data)
    measured = terms.measured()
    assert measured.keys() == {"l2", "l1", "l2/largest"}
    assert_close(measured["l2"], SQUARED(params, data))
    assert_close(measured["l2/largest"], jnp.max(MODEL(params, data["inputs"])))


def test_the_loss_that_is_reported_is_not_scaled_by_its_weight(x64):
    both = bh.combine({"l2": SQUARED, "l1": ABSOLUTE}, {"l2": 1.0, "l1": 0.1})
    data = regression()
    params = start(both, data)
    measured = both.forward(params, data)[0].measured()
    assert_close(measured["l1"], ABSOLUTE(params, data))


def test_each_objective_has_a_key_of_its_own(x64):
    noisy = bh.objective(
        bh.chain(bh.dropout(0.5), bh.dense(2)),
        bh.losses.mean_squared_error,
        metrics={"sum": lambda p, t, w=None: bh.metrics.Sum(jnp.sum(p))},
    )
    both = bh.combine({"a": noisy, "b": noisy}, {"a": 1.0, "b": 1.0})
    data = regression()
    params = start(both, data)
    key = jax.random.key(3)
    measured = both.forward(params, data, key=key)[0].measured()
    assert measured["a/sum"] != measured["b/sum"]
    assert_gradients_agree(both, params, data, key=key)


def test_statistics_are_gathered_over_objectives(x64):
    model = bh.chain(bh.dense(4), bh.batch_norm(), bh.dense(2))
    one = bh.objective(model, bh.losses.mean_squared_error)
    both = bh.combine({"a": one, "b": one}, {"a": 1.0, "b": 1.0})
    data = regression()
    params = one.init(jax.random.key(0), data)
    _, seen = bh.value_and_collect(both, statistics=bh.statistics)(params, data)
    _, alone = bh.value_and_collect(one, statistics=bh.statistics)(params, data)
    twice = jax.tree.map(lambda x: 2 * x, alone)
    assert_close(seen, twice)


def test_the_first_objective_makes_the_parameters(x64):
    both = bh.combine({"l2": SQUARED, "l1": ABSOLUTE}, {"l2": 1.0, "l1": 0.1})
    data = regression()
    ours, first = (o.init(jax.random.key(4), data) for o in (both, SQUARED))
    assert_close(ours, first)
    assert both.model is MODEL


def test_a_combination_of_combinations_is_one(x64):
    inner = bh.combine({"l2": SQUARED, "l1": ABSOLUTE}, {"l2": 1.0, "l1": 0.1})
    outer = bh.combine({"inner": inner, "more": ABSOLUTE}, {"inner": 3.0, "more": 1.0})
    data = regression([1, 0, 2, 1, 0.5, 3])
    params = start(outer, data)
    assert_close(outer(params, data), 3 * inner(params, data) + ABSOLUTE(params, data))
    assert_gradients_agree(outer, params, data)
    accumulated = bh.accumulate(bh.value_and_grad(outer), 4)(params, data)
    assert_close(accumulated, bh.value_and_grad(outer)(params, data))


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(ValueError, match=r"by the same names; got \['a'\] and \['b'\]"):
        bh.combine({"a": SQUARED}, {"b": 1.0})
    with pytest.raises(ValueError, match=r"by the same names; got \[\] and \[\]"):
        bh.combine({}, {})
    with pytest.raises(ValueError, match="may be named 'loss', which a training step reports"):
        bh.combine({"loss": SQUARED}, {"loss": 1.0})
    with pytest.raises(ValueError, match="names without '/', which joins metrics; got 'a/b'"):
        bh.combine({"a/b": SQUARED}, {"a/b": 1.0})
    both = bh.combine({"l2": SQUARED, "l1": ABSOLUTE}, {"l2": 1.0, "l1": 0.1})
    data = regression()
    params = start(both, data)
    with pytest.raises(ValueError, match="must add up over the uses"):
        bh.value_and_collect(both, norms=bh.square_norms)(params, data)
    negative = {**data, "weights": np.asarray([1.0, 1, 1, 1, 1, -1])}
    with pytest.raises(ValueError, match="weights must be 0 or more"):
        both(params, negative)


def test_each_objective_takes_what_it_uses_of_a_batch(x64):
    """One has no targets, another a side input of its own; what none uses is refused."""
    apart = bh.objective(MODEL, bh.losses.triplet)
    both = bh.combine({"l2": SQUARED, "apart": apart}, {"l2": 1.0, "apart": 0.5})
    data = {**regression(), "inputs": normal(0, BATCH, 3, 3)}
    data["targets"] = normal(1, BATCH, 3, 2)
    params = start(both, data)
    alone = {"inputs": data["inputs"]}
    assert_close(both(params, data), SQUARED(params, data) + 0.5 * apart(params, alone))
    with pytest.raises(ValueError, match="'lengths', which the model does not use"):
        both(params, {**data, "lengths": jnp.ones(BATCH)})


@pytest.mark.parametrize(
    ("objective", "weight", "message"),
    [
        (3, 1.0, "needs an objective, made by"),
        (SQUARED, "1", "the weight of 'a' must be a number, got '1'"),
        (SQUARED, float("nan"), "the weight of 'a' must be finite, got nan"),
    ],
)
def test_what_cannot_be_weighed_is_refused(unchecked, objective, weight, message):
    with pytest.raises((TypeError, ValueError), match=message):
        bh.combine({"a": objective}, {"a": weight})
