"""A layer as a function that JAX differentiates by the hand-written reverse."""

import jax
import jax.numpy as jnp

import backhand as bh
from tests.support import assert_close, normal, spread


def side_model():
    """Reads a mask from the batch."""

    def forward(params, x, *, source_mask):
        return jnp.where(source_mask, x, 0), source_mask

    rule = lambda params, mask, dy, *, source_mask: ((), jnp.where(mask, dy, 0))  # noqa: E731
    masked = bh.layer("masked", lambda key, x: (), forward, rule)
    return bh.chain(masked, bh.dense(3))


def wrong_by(factor):
    def forward(params, x):
        return params["s"][None] * x, x

    def rule(params, x, dy):
        return {"s": factor * jnp.sum(dy * x, 0)}, factor * params["s"][None] * dy

    return bh.layer("scale", lambda key, x: {"s": jnp.ones(x.shape[-1])}, forward, rule)


def test_jax_grad_runs_the_hand_written_rule(x64):
    params, x = {"s": jnp.asarray([2.0, 3.0])}, normal(0, 4, 2)
    for factor in (1, -7):
        f = bh.differentiable(bh.chain(wrong_by(factor), bh.tanh()))
        plain = bh.chain(wrong_by(factor), bh.tanh())
        ours = jax.grad(lambda *args, f=f: jnp.sum(f(*args) ** 2), (0, 1))((params, ()), x)
        truth = jax.grad(lambda *args, f=plain: jnp.sum(f(*args) ** 2), (0, 1))((params, ()), x)
        assert_close(ours, jax.tree.map(lambda leaf, k=factor: k * leaf, truth))


def test_a_differentiable_layer_goes_through_transformations(x64):
    layer = bh.chain(side_model(), bh.dropout(0.5), bh.tanh())
    x, mask = normal(0, 6, 4), normal(5, 6, 4) > 0
    params = spread(jax.jit(lambda key: layer.init(key, x, source_mask=mask))(jax.random.key(0)))
    f = bh.differentiable(layer)

    def loss(function, params, x):
        y = function(params, x, source_mask=mask, training=True, key=jax.random.key(2))
        return jnp.sum(y**2)

    def derivatives(function):
        first = jax.grad(lambda *args: loss(function, *args), (0, 1))
        each = jax.vmap(lambda s: first(params, s * x))(jnp.asarray([1.0, 2.0]))
        second = jax.grad(lambda x: jnp.sum(jnp.sin(first(params, x)[1])))(x)
        return first(params, x), each, second

    ours, truth = jax.jit(lambda: (derivatives(f), derivatives(layer)))()
    assert_close(ours, truth)
