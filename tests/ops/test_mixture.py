"""The mixture of experts: what routing promises, and every gradient through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_close, normal, random_like, temporary_bytes

OP = bh.ops.mixture_of_experts


def arrays(seed=0, batch=2, tokens=6, features=4, experts=3, hidden=5, gated=False):
    return (
        normal(seed, batch, tokens, features),
        2 * normal(seed + 1, features, experts),
        normal(seed + 2, experts, features, hidden),
        normal(seed + 3, experts, hidden, features),
        normal(seed + 4, experts, features, hidden) if gated else None,
    )


SETTINGS = [  # (B, T, D, E, H), gated, top_k, capacity_factor, activation
    ((2, 6, 4, 3, 5), False, 1, 0.4, "gelu"),
    ((2, 6, 4, 3, 5), True, 2, 1.25, "silu"),
    ((1, 9, 3, 4, 2), True, 3, 0.7, "relu"),
    ((3, 1, 2, 2, 6), False, 2, None, "tanh"),
    ((2, 5, 1, 1, 3), False, 1, 1.0, "sigmoid"),
    ((1, 7, 5, 6, 1), True, 4, None, "gelu_tanh"),
    ((2, 4, 3, 5, 4), False, 5, 0.6, "silu"),
    ((4, 3, 2, 3, 2), True, 1, None, "gelu"),
]


@settings(max_examples=200)
@given(st.sampled_from(SETTINGS), st.sampled_from([0.0, 0.7, 1.0]), st.integers(0, 1000))
def test_any_routing_has_the_gradient_of_autodiff(setting, share, seed):
    """Random routers, some choices dropped, some tokens not there."""
    (batch, tokens, features, experts, hidden), gated, top_k, factor, activation = setting
    random = np.random.default_rng(seed)
    shapes = [(features, experts), (experts, features, hidden), (experts, hidden, features)]
    given_ = [random.standard_normal(own) for own in ((batch, tokens, features), *shapes)]
    gate = random.standard_normal(shapes[1]) if gated else None
    mask = random.random((batch, tokens)) < share
    how = {"top_k": top_k, "capacity_factor": factor, "activation": activation}
    assert_is_its_reference(OP, (*given_, gate, mask), seed, floor=1e-12, **how)


def test_an_example_does_not_depend_on_the_others(x64):
    given = arrays()
    run = jax.jit(OP.bind(capacity_factor=0.6))
    y, balance = run(*given)
    for b in range(2):
        one, own = run(given[0][b : b + 1], *given[1:])
        assert_close((one, own), (y[b : b + 1], balance[b : b + 1]))


def test_who_finds_no_place_gives_zero_and_gets_no_blame(x64):
    """All tokens choose the first expert, which has two places."""
    x, _, *weights = arrays(tokens=6)
    router, x = jnp.zeros((4, 3)).at[0, 0].set(9.0), x.at[..., 0].set(1.0)
    op = OP.bind(top_k=1, capacity_factor=1.0)

    @jax.jit
    def run(*given):
        (y, balance), residuals = op.forward(*given)
        return y, balance, op.backward(residuals, (jnp.ones_like(y), jnp.zeros_like(balance)))[0]

    y, balance, dx = map(np.asarray, run(x, router, *weights))
    assert y[:, :2].all() and not y[:, 2:].any()
    assert dx[:, :2].all() and not dx[:, 2:].any()
    assert (balance > 2.9).all()


def test_an_even_router_is_in_balance_and_equal_probabilities_choose_the_first(x64):
    x, router, *weights = arrays()
    how = {"top_k": 1, "capacity_factor": None, "activation": "relu"}
    y, balance = OP(x, 0 * router, *weights, **how)
    assert_close(balance, jnp.ones(2))
    only = jnp.maximum(x @ weights[0][0], 0) @ weights[1][0] / 3
    assert_close(y, only)


def test_padding_takes_no_place_and_gets_no_blame_whatever_it_holds(x64):
    given = arrays()
    mask = jnp.asarray([[True] * 6, [True] * 3 + [False] * 3])
    x = given[0].at[1, 3:].set(jnp.nan)
    op = OP.bind(capacity_factor=None)

    @jax.jit
    def run(*given):
        y, residuals = op.forward(*given)
        return y, op.backward(residuals, random_like(y))

    (y, balance), (dx, *dweights) = run(x, *given[1:], mask)
    alone = jax.jit(op)(x[1:, :3], *given[1:])
    assert_close((y[1:, :3], balance[1:]), alone)
    assert not y[1, 3:].any() and not dx[1, 3:].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((dx, dweights)))


def test_less_memory_than_dispatch_by_products():
    given = arrays(batch=2, tokens=64, features=32, experts=4, hidden=64)

    def dense(x, router, w_in, w_out, _):
        return bh.ops.mixture_of_experts.reference(x, router, w_in, w_out)

    ours, theirs = (
        temporary_bytes(jax.grad(lambda *a, f=f: (f(*a)[0] ** 2).sum(), (0, 1, 2, 3)), *given)
        for f in (OP, dense)
    )
    assert ours <= 0.8 * theirs


def shape(*axes, dtype="float32"):
    return jax.ShapeDtypeStruct(axes, dtype)


GOOD = {
    "x": shape(2, 6, 4),
    "router": shape(4, 3),
    "w_in": shape(3, 4, 5),
    "w_out": shape(3, 5, 4),
    "w_gate": shape(3, 4, 5),
    "mask": shape(2, 6, dtype="bool"),
}


@pytest.mark.parametrize(
    ("argument", "wrong", "error", "message"),
    [
        ("x", shape(6, 4), ValueError, r"\(B, T, D\), got \(6, 4\): .* a batch of one, x\[None\]"),
        ("x", shape(2, 6, 4, dtype="int32"), TypeError, "floating-point input, got int32"),
        ("router", shape(5, 3), ValueError, r"a router \(D, E\) .* got \(5, 3\)"),
        ("w_in", shape(2, 4, 5), ValueError, r"w_in of shape \(3, 4, 5\) .* got \(2, 4, 5\)"),
        ("w_out", shape(3, 4, 5), ValueError, r"w_out of shape \(3, 5, 4\) .* got \(3, 4, 5\)"),
        ("w_gate", shape(4, 5), ValueError, r"w_gate of shape \(3, 4, 5\) .* got \(4, 5\)"),
        ("w_out", shape(3, 5, 4, dtype="int32"), TypeError, r"floating-point w_out, .* w_out\.as"),
        ("mask", shape(2, 6), TypeError, "a boolean mask, got float32"),
        ("mask", shape(2, 5, dtype="bool"), ValueError, r"mask of shape \(2, 6\), got \(2, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(argument, wrong, error, message, unchecked, nothing_compiles):
    with nothing_compiles(), pytest.raises(error, match=f"mixture_of_experts needs .*{message}"):
        jax.eval_shape(OP, *{**GOOD, argument: wrong}.values())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"capacity_factor": "a"}, "capacity_factor must be a number, got 'a'"),
        ({"top_k": 4}, "top_k from 1 to its 3 experts, got 4"),
        ({"top_k": 0}, "top_k from 1 to its 3 experts, got 0"),
        ({"capacity_factor": 0.0}, "a positive capacity_factor, or None .* got 0.0"),
        ({"activation": "swish"}, "an activation that is one of .* got 'swish'"),
    ],
)
def test_settings_that_cannot_be_are_refused(how, message, unchecked, nothing_compiles):
    with nothing_compiles(), pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(OP.bind(**how), *GOOD.values())
