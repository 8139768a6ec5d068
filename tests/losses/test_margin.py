"""Hinge losses: nothing beyond the margin, ties and kinks as JAX has them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from tests.support import assert_close, labels, normal

BINARY, MULTI = bh.losses.hinge, bh.losses.multiclass_hinge


def test_they_are_what_optax_has(x64):
    x, bits = normal(0, 6), labels(1, 2, 6)
    assert_close(BINARY(x, bits)[0], optax.losses.hinge_loss(x, (2 * bits - 1).astype(float)).sum())
    x, ids = normal(0, 6, 4), labels(1, 4, 6)
    assert_close(MULTI(x, ids)[0], optax.losses.multiclass_hinge_loss(x, ids).sum())


@pytest.mark.parametrize(
    ("x", "target", "value", "blame"),
    [
        (2.0, 1, 0.0, 0.0),
        (0.25, 1, 0.75, -1.0),
        (-1.0, 1, 2.0, -1.0),
        (0.25, 0, 1.25, 1.0),
        (1.0, 1, 0.0, 0.0),
        (-1.0, 0, 0.0, 0.0),
    ],
)
def test_known_values_and_blames(x, target, value, blame):
    def loss(x):
        return BINARY(x, jnp.asarray([target]))[0]

    found, dx = jax.value_and_grad(loss)(jnp.asarray([x]))
    assert (float(found), float(dx[0])) == (value, blame)


def test_who_leads_by_the_margin_is_not_blamed_and_the_largest_rival_alone_is():
    x = jnp.asarray([[3.0, 1.0, 0.0], [1.0, 0.75, 0.5]])
    dx = jax.grad(lambda x: MULTI(x, jnp.asarray([0, 0]))[0])(x)
    assert dx.tolist() == [[0, 0, 0], [-1, 1, 0]]


def test_classes_that_are_largest_together_share_the_blame_as_jax_has_it(x64):
    x = jnp.asarray([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    ids = jnp.asarray([0, 0])
    dx = jax.grad(lambda x: MULTI(x, ids)[0])(x)
    assert dx[0].tolist() == [-1, 0.5, 0.5]
    assert_close(dx, jax.grad(lambda x: MULTI.reference(x, ids)[0])(x))


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_that_does_not_exist_is_noticed_unless_it_has_no_weight(label):
    x, ids = normal(0, 2, 3), jnp.asarray([label, 1])
    total, dx = jax.value_and_grad(lambda x: MULTI(x, ids)[0])(x)
    assert np.isnan(total) and not dx[0].any() and np.isfinite(dx).all()
    assert np.isfinite(MULTI(x, ids, jnp.asarray([0.0, 1.0]))[0])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        MULTI.check(jax.ShapeDtypeStruct((2, 3), "float32"), np.asarray(ids), None)


def test_a_logit_that_is_no_number_is_noticed():
    assert jnp.isnan(BINARY(jnp.array([jnp.nan, 2.0]), jnp.array([1, 1]))[0])


def test_what_does_not_fit_is_refused(unchecked):
    shape = jax.ShapeDtypeStruct
    x = shape((3, 4), "float32")
    with pytest.raises(ValueError, match=r"labels of shape \(3,\); got \(3, 4\)"):
        jax.eval_shape(MULTI, x, shape((3, 4), "int32"))
    with pytest.raises(TypeError, match="integer labels, got float32"):
        jax.eval_shape(MULTI, x, shape((3,), "float32"))
    for loss, targets in ((BINARY, shape((3, 4), "int32")), (MULTI, shape((3,), "int32"))):
        with pytest.raises(ValueError, match="margin above 0, got 0"):
            jax.eval_shape(loss.bind(margin=0.0), x, targets)
