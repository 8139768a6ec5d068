"""Metrics: what is reported, and that parts of a batch combine to it."""

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from backhand.metrics import Last, Max, Mean, Sum, reduction

LOGITS = jnp.asarray([[[2.0, 1, 0], [0, 3, 1]], [[0, 0, 9], [1, 0, 0]]])
LABELS = jnp.asarray([[0, 2], [2, 1]])


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, 0.5),
        (jnp.asarray([1.0, 3.0]), 0.5),
        (jnp.asarray([True, False]), 0.5),
        (jnp.asarray([[1, 0], [1, 0]]), 1.0),
        (jnp.asarray([[0.0, 5.0], [1.0, 4.0]]), 0.1),
        (jnp.zeros(2), 0.0),
    ],
)
def test_accuracy_is_the_weighted_share_of_hits(weights, expected):
    measured = bh.metrics.accuracy(LOGITS, LABELS, weights)
    assert float(measured.value()) == pytest.approx(expected)


def test_accuracy_takes_labels_of_any_integer_dtype_and_logits_of_any_float():
    for dtype in (jnp.int8, jnp.uint32):
        assert bh.metrics.accuracy(LOGITS.astype(jnp.bfloat16), LABELS.astype(dtype)).value() == 0.5


@pytest.mark.parametrize("reduce", [Mean, Sum, Max, Last])
def test_parts_combine_to_the_whole(reduce):
    parts = [[1.0, 5.0, 2.0], [4.0, 0.0, 1.0]][: len(reduce._fields)]
    combined = reduce(*(jnp.asarray(part) for part in parts)).combine().value()
    assert combined == {Mean: 8 / 5, Sum: 8, Max: 5, Last: 2}[reduce]


def test_the_last_may_be_a_tree():
    state = (jnp.asarray([1.0, 2.0]), {"c": jnp.asarray([3, 4])})
    assert Last(state).combine().value() == (2, {"c": 4})
    assert Last(state).combine(jnp.asarray([True, False])).value() == (1, {"c": 3})
    assert bh.metrics.state((jnp.ones(2), state), None).value() is state


def test_a_loss_is_a_metric_too():
    metric = reduction(bh.losses.mean_squared_error(jnp.asarray([1.0, 3.0]), jnp.zeros(2)))
    assert metric.value() == 5
    assert reduction((6, 3)).value() == 2


def test_what_a_metric_may_not_give_is_refused(unchecked, nothing_compiles):
    logits, labels = (jax.ShapeDtypeStruct((4, 3), "float32"), jax.ShapeDtypeStruct((3,), "int32"))
    weights = jax.ShapeDtypeStruct((4, 2), "float32")
    with nothing_compiles():
        for measured in (1.0, (1.0, 2.0, 3.0), [1.0, 2.0], None):
            with pytest.raises(TypeError, match=r"a metric gives a \(sum, weight\) pair, or Mean"):
                reduction(measured)
        with pytest.raises(TypeError, match=r"got a tuple: .*metrics\.accuracy\(y\[0\], targets"):
            bh.metrics.accuracy((logits, labels), labels)
        with pytest.raises(ValueError, match=r"labels of shape \(4,\), got \(3,\)"):
            jax.eval_shape(bh.metrics.accuracy, logits, labels)
        with pytest.raises(ValueError, match=r"weights whose shape begins as .* got \(4, 2\)"):
            jax.eval_shape(
                bh.metrics.accuracy, logits, jax.ShapeDtypeStruct((4,), "int32"), weights
            )


def test_names_that_a_training_step_reports_are_taken():
    for name in ("loss", "gradient_norm", "dropped"):
        with pytest.raises(
            ValueError, match=f"may be named '{name}'.*reserved are clipped, dropped"
        ):
            bh.objective(
                bh.dense(3), bh.losses.softmax_cross_entropy, metrics={name: bh.metrics.accuracy}
            )
