"""Cross-entropies: exact at any finite logit, honest about labels that do not exist."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_close, labels, normal, temporary_bytes

SOFTMAX, SIGMOID = bh.losses.softmax_cross_entropy, bh.losses.sigmoid_cross_entropy


def both_ways(loss, logits, targets, weights=None):
    (total, _), residuals = loss.forward(logits, targets, weights)
    dy = (jnp.ones_like(total), jnp.zeros_like(total))
    return total, loss.backward(residuals, dy)[0]


def test_the_blame_is_what_was_predicted_less_what_was_true(x64):
    x, targets = normal(0, 4, 3), labels(1, 3, 4)
    _, dx = both_ways(SOFTMAX, x, targets)
    assert_close(dx, jax.nn.softmax(x) - jax.nn.one_hot(targets, 3, dtype=x.dtype))
    bits = labels(2, 2, 4, 3)
    _, dx = both_ways(SIGMOID, x, bits)
    assert_close(dx, jax.nn.sigmoid(x) - bits.astype(x.dtype))


def test_labels_are_probabilities_of_one(x64):
    x, targets = normal(0, 4, 3), labels(1, 3, 4)
    for smoothing in (0.0, 0.1, 1.0):
        loss = SOFTMAX.bind(label_smoothing=smoothing)
        onehot = jax.nn.one_hot(targets, 3, dtype=x.dtype)
        assert_close(both_ways(loss, x, targets), both_ways(loss, x, onehot))
        mixed = onehot * (1 - smoothing) + smoothing / 3
        assert_close(both_ways(loss, x, targets), both_ways(SOFTMAX, x, mixed))
    two = jnp.stack([jnp.zeros(4), x[:, 0]], -1)
    bits = labels(1, 2, 4)
    assert_close(both_ways(SIGMOID, x[:, 0], bits)[0], both_ways(SOFTMAX, two, bits)[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits_give_exact_losses_and_blames(dtype):
    x = jnp.asarray([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], dtype)
    top = float(x[0, 0])
    total, dx = both_ways(SOFTMAX, x, jnp.asarray([0, 0]))
    assert float(total) == 2 * top
    assert dx.astype(float).tolist() == [[0, 0, 0], [-1, 1, 0]]
    assert dx.dtype == dtype
    total, dx = both_ways(SIGMOID, x[:, :2], jnp.asarray([[1, 0], [1, 1]]))
    assert float(total) == top
    assert dx.astype(float).tolist() == [[0, 0], [-1, 0]]


def test_impossible_classes_of_no_probability_cost_nothing():
    x = jnp.asarray([[-jnp.inf, 0.0, 0.0]])
    total, dx = both_ways(SOFTMAX, x, jnp.asarray([1]))
    assert float(total) == pytest.approx(np.log(2))
    assert dx.tolist() == [[0, -0.5, 0.5]]
    assert float(both_ways(SOFTMAX, x, jnp.asarray([0]))[0]) == np.inf


def test_a_small_loss_keeps_its_digits():
    """log(1 + exp(-30)) is 1e-13, which 1 - p would round to zero in float32."""
    for loss, x, target in (
        (SIGMOID, jnp.asarray([30.0]), jnp.asarray([1])),
        (SOFTMAX, jnp.asarray([[12.0, 0.0]]), jnp.asarray([0])),
    ):
        total, _ = both_ways(loss, x, target)
        margin = 30.0 if loss is SIGMOID else 12.0
        assert float(total) == pytest.approx(np.log1p(np.exp(-margin)), rel=0.05)


def test_the_blame_of_what_is_nearly_certain_keeps_its_digits():
    x = jnp.concatenate([jnp.linspace(-60, 60, 121)] * 2)
    bits = jnp.repeat(jnp.arange(2), 121)
    _, dx = both_ways(SIGMOID, x, bits)
    z = np.asarray(x, np.float64) * (1 - 2 * np.asarray(bits))
    expected = (1 - 2 * np.asarray(bits)) / (1 + np.exp(-z))
    assert np.abs(np.asarray(dx) / expected - 1).max() < 3e-7


@pytest.mark.parametrize("name", ["sigmoid_cross_entropy", "sigmoid_focal", "hinge", "dice"])
@pytest.mark.parametrize("wrong", [-1, 2.0, np.nan])
def test_shares_are_checked_on_the_host(name, wrong):
    check = getattr(bh.losses, name).check
    logits, targets = jax.ShapeDtypeStruct((2, 3), "float32"), np.ones((2, 3), "float32")
    check(logits, targets > 0, None)
    targets[1, 2] = wrong
    with pytest.raises(ValueError, match=r"targets must lie in \[0, 1\].* got .* at \[1, 2\]"):
        check(logits, targets, np.ones(2))
    check(logits, targets, np.asarray([1.0, 0.0]))
    check(logits, jnp.asarray(targets), None)  # on a device: not fetched


@pytest.mark.parametrize("label", [3, -1, 2**31 - 1])
def test_a_label_that_does_not_exist_is_noticed_unless_it_has_no_weight(label):
    x, targets = normal(0, 3, 3), jnp.asarray([0, label, 2])
    total, dx = both_ways(SOFTMAX, x, targets)
    assert np.isnan(total) and np.isfinite(dx).all()
    total, dx = both_ways(SOFTMAX, x, targets, jnp.asarray([1.0, 0.0, 1.0]))
    expected = both_ways(SOFTMAX, x[::2], targets[::2])
    assert_close((total, dx[::2]), expected, 1e-6)
    assert not dx[1].any()


def test_labels_may_be_any_integers_and_any_number_of_positions(x64):
    x = normal(0, 2, 3, 4, 5)
    for dtype in ("int8", "uint8", "int64", "uint32"):
        targets = labels(1, 5, 2, 3, 4).astype(dtype)
        picked = jnp.take_along_axis(jax.nn.log_softmax(x), targets.astype(int)[..., None], -1)
        assert_close(SOFTMAX(x, targets), (-picked.sum(), jnp.asarray(24.0)))


def test_labels_are_checked_on_the_host():
    logits = jax.ShapeDtypeStruct((3, 4), "float32")
    good = np.asarray([0, 3, 1])
    SOFTMAX.check(logits, good, None)
    SOFTMAX.check(logits, np.asarray([0, 4, 1]), np.asarray([1.0, 0.0, 1.0]))
    SOFTMAX.check(logits, np.full((3, 4), 0.25), None)
    SOFTMAX.check(logits, jnp.asarray([9, 9, 9]), None)  # on a device: not fetched
    for targets, weights in (([0, 4, 1], None), ([0, 4, 1], np.ones(3)), ([-1, 0, 0], None)):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\), the number of logits"):
            SOFTMAX.check(logits, np.asarray(targets), weights)


def test_what_is_no_classification_is_refused(unchecked, nothing_compiles):
    shape = jax.ShapeDtypeStruct
    x = shape((3, 4), "float32")
    with nothing_compiles():
        for targets in (shape((4,), "int32"), shape((3, 4), "int32"), shape((3,), "float32")):
            with pytest.raises(
                ValueError, match=r"for logits \(3, 4\), integer labels of shape \(3"
            ):
                jax.eval_shape(SOFTMAX, x, targets)
        with pytest.raises(TypeError, match="needs targets as an array, got a list of 3"):
            jax.eval_shape(SOFTMAX, x, [0, 1, 2])
        with pytest.raises(TypeError, match="needs floating-point logits, got int32"):
            jax.eval_shape(SOFTMAX, shape((3, 4), "int32"), shape((3,), "int32"))
        with pytest.raises(ValueError, match=r"one shape, got \(3, 4\) and \(3,\)"):
            jax.eval_shape(SIGMOID, x, shape((3,), "int32"))
        for loss, targets in ((SOFTMAX, shape((3,), "int32")), (SIGMOID, shape((3, 4), "int32"))):
            with pytest.raises(ValueError, match=r"label_smoothing in \[0, 1\], got 1.5"):
                jax.eval_shape(loss.bind(label_smoothing=1.5), x, targets)


def test_all_of_the_smoothing_is_spread_whatever_the_label():
    logits = jnp.array([[0.0, 0.0, -jnp.inf]])
    total, _ = SOFTMAX(logits, jnp.array([2]), label_smoothing=1.0)
    assert total == jnp.inf  # as for any label: the impossible class has its share


def test_the_way_back_keeps_no_array_of_logits():
    """Beside the error itself, which is a result."""
    logits, known = normal(0, 256, 512), labels(1, 512, 256)
    kept = temporary_bytes(jax.value_and_grad(lambda x: SOFTMAX(x, known)[0]), logits)
    assert kept < logits.nbytes / 8
