"""The contrastive loss: whose keys are whose negatives, one way and both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_close, assert_gradients_agree, normal

NCE = bh.losses.info_nce


def definition(q, k, keep, temperature):
    """The losses of those that are kept, among themselves, one way."""
    q, k = (np.asarray(x, np.float64)[keep] for x in (q, k))
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, k))
    z = q @ k.T / temperature
    return float(np.sum(np.log(np.exp(z).sum(1)) - np.diag(z)))


def test_each_query_is_to_find_its_key_among_those_of_weight(x64):
    q, k = normal(0, 6, 4), normal(1, 6, 4)
    for keep in ([True] * 6, [True, False, True, True, False, True]):
        keep = np.asarray(keep)
        total, weight = NCE(q, k, jnp.asarray(keep), temperature=0.5)
        assert float(total) == pytest.approx(definition(q, k, keep, 0.5), rel=1e-12)
        assert float(weight) == keep.sum()
        total, weight = NCE(q, k, jnp.asarray(keep), temperature=0.5, symmetric=True)
        both = (definition(q, k, keep, 0.5) + definition(k, q, keep, 0.5)) / 2
        assert float(total) == pytest.approx(both, rel=1e-12)
        assert float(weight) == keep.sum()


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_example_of_weight_zero_is_left_out_of_its_negatives(x64, symmetric):
    q, k, w = normal(0, 4, 3), normal(1, 4, 3), jnp.asarray([1.0, 0.0, 2.0, 1.0])

    def both(q, k):
        return jax.value_and_grad(lambda *x: NCE(*x, w, symmetric=symmetric)[0], (0, 1))(q, k)

    clean = both(q, k)
    assert not clean[1][0][1].any() and not clean[1][1][1].any()
    assert_close(both(q.at[1].set(jnp.nan), k.at[1].set(jnp.inf)), clean)


def test_one_example_has_no_negatives_and_no_blame():
    q = normal(0, 1, 3)
    total, dq = jax.value_and_grad(lambda q: NCE(q, normal(1, 1, 3))[0])(q)
    assert float(total) == 0 and not dq.any()


def test_cold_temperatures_stay_finite():
    q, k = normal(0, 4, 3), normal(1, 4, 3)
    total, dq = jax.value_and_grad(lambda q: NCE(q, k, temperature=1e-4)[0])(q)
    assert np.isfinite(total) and np.isfinite(dq).all()


def test_two_encoders_are_trained_without_targets(x64, nothing_compiles):
    both = bh.chain(bh.on(0, bh.dense(4)), bh.on(1, bh.dense(4)))
    loss = bh.objective(both, bh.losses.paired(NCE.bind(symmetric=True)))
    batch = {"inputs": (normal(0, 5, 6), normal(1, 5, 3)), "weights": jnp.arange(5.0)}
    params = loss.init(jax.random.key(0), batch)
    assert_gradients_agree(loss, params, batch)
    total, weight = NCE(*both(params, batch["inputs"]), batch["weights"], symmetric=True)
    assert_close(loss(params, batch), total / weight)
    with nothing_compiles(), pytest.raises(ValueError, match="weights must be 0 or more"):
        loss(params, {**batch, "weights": -np.ones(5)})


def test_what_does_not_fit_is_refused(unchecked):
    shape = jax.ShapeDtypeStruct
    x, other = shape((3, 4), "float32"), shape((3, 5), "float32")
    for call, message in (
        (lambda: jax.eval_shape(NCE, x, other), r"keys of one shape \(B, D\), got \(3, 4\) and"),
        (lambda: jax.eval_shape(NCE, x, x, x), r"weights of shape \(3,\), one per example"),
        (lambda: jax.eval_shape(NCE.bind(temperature=0.0), x, x), "temperature above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="info_nce's symmetric must be True or False, got 3"):
        jax.eval_shape(NCE.bind(symmetric=3), x, x)
