"""Linear recurrence: sums and decays it contains, both of its forms, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from backhand.ops.linear_recurrence import _by_association, _by_step
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_close, normal, temporary_bytes

op = bh.ops.linear_recurrence
FORMS = {"by_step": _by_step, "by_association": _by_association}


def test_with_factors_of_one_it_is_a_running_sum(x64):
    b = normal(0, 2, 7, 3)
    assert_close(op(jnp.ones_like(b), b), jnp.cumsum(b, 1))
    blame = jax.grad(lambda b: op(jnp.ones_like(b), b)[:, -1].sum())(b)
    assert (blame == 1).all()


def test_a_factor_of_zero_begins_anew(x64):
    """And no blame crosses it: several sequences may be packed into one."""
    a, b = normal(0, 2, 7, 3).at[:, 4].set(0), normal(1, 2, 7, 3)
    assert_close(op(a, b)[:, 4:], op(a[:, 4:], b[:, 4:]))
    blame = jax.grad(lambda b: op(a, b)[:, 4:].sum())(b)
    assert not blame[:, :4].any() and blame[:, 4:].all()


@settings(max_examples=200)
@given(
    st.sampled_from([(2, 1, 3), (1, 2, 1), (3, 5, 2), (2, 8, 3)]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    st.integers(0, 2**20),
)
def test_any_length_and_any_factors(shape, state, reverse, scale, seed):
    random = np.random.default_rng(seed)
    a, b = scale * random.standard_normal(shape), random.standard_normal(shape)
    first = random.standard_normal((shape[0], shape[2])) if state else None
    assert_is_its_reference(op, (a, b, first), seed, floor=1e-13, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_the_reference(form, reverse, x64):
    a, b, state = normal(0, 2, 7, 3), normal(1, 2, 7, 3), normal(2, 2, 3)
    truth = op.reference(a, b, state, reverse=reverse)
    assert_close(FORMS[form](a, b, state, reverse), truth)


def test_no_step_is_no_state():
    none = jnp.zeros((2, 0, 3))
    y, residuals = op.forward(none, none, jnp.ones((2, 3)))
    da, db, dstate = op.backward(residuals, none)
    assert y.shape == da.shape == db.shape == (2, 0, 3) and not dstate.any()


def test_half_the_memory_of_autodiff():
    a, b = normal(0, 4, 256, 32), normal(1, 4, 256, 32)
    ours, theirs = (
        temporary_bytes(jax.grad(lambda *x, f=f: (f(*x) ** 2).sum(), (0, 1)), a, b)
        for f in (op, op.reference)
    )
    assert ours <= 0.6 * theirs


def test_what_does_not_fit_is_refused(unchecked, nothing_compiles):
    def shape(*axes, dtype="float32"):
        return jax.ShapeDtypeStruct(axes, dtype)

    x = shape(2, 5, 3)
    with nothing_compiles():
        for arrays, error, message in (
            ((x, shape(5, 3)), ValueError, r"needs x of shape \(B, T, D\), got \(5, 3\)"),
            ((shape(5, 3), x), ValueError, r"a and b of one shape .* \(5, 3\) and \(2, 5, 3\)"),
            ((x, x, shape(3)), ValueError, r"state h of shape \(B, H\) = \(2, 3\), got \(3,\)"),
            ((shape(2, 5, 3, dtype="int32"), x), TypeError, "floating-point a, got int32"),
        ):
            with pytest.raises(error, match=message):
                jax.eval_shape(op, *arrays)
