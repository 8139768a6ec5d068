"""What tests of the core share: data, an independent gradient, comparison of every leaf."""

import jax
import jax.numpy as jnp
import numpy as np

import backhand as bh


def normal(seed, *shape, dtype=None):
    """Standard normal numbers, in the default floating-point dtype."""
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, dtype or jnp.result_type(float))


def labels(seed, below, *shape):
    """Integers in [0, below), int32."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, below, shape), jnp.int32)


def initial(layer, x, seed=9, **side):
    """Parameters of a layer, moved away from where they begin: no zero or one hides a mistake."""
    run = jax.jit(lambda key: layer.init(key, bh.protocol.shapes_of(x), **side))
    return spread(run(jax.random.key(0)), seed)


def spread(params, seed=9):
    """The parameters moved away from where they begin, in the default floating-point dtype."""
    random, dtype = np.random.default_rng(seed), jnp.result_type(float)

    def moved(leaf):
        return jnp.asarray(np.asarray(leaf) + 0.3 * random.standard_normal(leaf.shape) ** 2, dtype)

    return jax.tree.map(moved, params)


def assert_close(ours, truth, rtol=1e-12, floor=None):
    """Every leaf of two trees of one structure, shape and dtype: max |a - b| <= rtol max |b|.

    A leaf may also be off by `floor`: what is zero but for rounding has no relative error.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(truth)
    pairs = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(truth), strict=True)
    for (path, a), b in pairs:
        name = jax.tree_util.keystr(path)
        assert (jnp.shape(a), jnp.result_type(a)) == (jnp.shape(b), jnp.result_type(b)), name
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all() and np.isfinite(b).all(), f"{name} is not finite"
        worst, largest = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
        limit = rtol * largest + (1e-2 * rtol if floor is None else floor)
        assert worst <= limit, (
            f"{name}: differs by {worst:.2e}, its largest element is {largest:.2e}"
        )


def assert_identical(ours, other):
    """Every leaf of two trees of one structure, bit for bit."""
    assert jax.tree.structure(ours) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def random_like(tree, seed=100):
    """A random error for every floating-point leaf, None for the others."""
    leaves, structure = jax.tree.flatten(tree)

    def error(leaf, seed):
        if not bh.arrays.is_floating(leaf):
            return None
        return normal(seed, *leaf.shape, dtype=leaf.dtype)

    return structure.unflatten([error(leaf, seed + i) for i, leaf in enumerate(leaves)])


def both_gradients(layer, params, x, **side):
    """(dparams, dx) by the hand-written backward and by `jax.vjp` of the forward, of a random dy.

    Parts of x that are integers have no error: None in both.
    """
    leaves, structure = jax.tree.flatten(x)
    floating = [bh.arrays.is_floating(leaf) for leaf in leaves]

    def by_floats(params, floats):
        rest = iter(floats)
        own = [next(rest) if f else leaf for leaf, f in zip(leaves, floating, strict=True)]
        y = layer(params, structure.unflatten(own), **side)
        return jax.tree.map(lambda leaf: leaf if bh.arrays.is_floating(leaf) else None, y)

    @jax.jit
    def run(params, x, floats):
        y, residuals = layer.forward(params, x, **side)
        dy = random_like(y)
        manual = layer.backward(params, residuals, dy, **side)
        return manual, jax.vjp(by_floats, params, floats)[1](dy)

    floats = [leaf for leaf, f in zip(leaves, floating, strict=True) if f]
    manual, (dparams, dfloats) = run(params, x, floats)
    rest = iter(dfloats)
    dx = [next(rest) if f else None for f in floating]
    return manual, (dparams, structure.unflatten(dx))


def assert_backward_is_the_gradient(layer, params, x, rtol=1e-12, **side):
    """The hand-written backward of a layer gives what `jax.vjp` of its forward gives."""
    manual, automatic = both_gradients(layer, params, x, **side)
    assert_close(manual, automatic, rtol)


def assert_gradients_agree(objective, params, batch, rtol=1e-12, **given):
    """`bh.value_and_grad` gives what `jax.value_and_grad` of the objective gives."""

    @jax.jit
    def run(params, batch):
        manual = bh.value_and_grad(objective)(params, batch, **given)
        automatic = jax.value_and_grad(lambda p: objective(p, batch, **given))(params)
        return manual, automatic

    assert_close(*run(params, batch), rtol)


def assert_gradient_and_norms(objective, params, batch, depth=0, rtol=1e-12):
    """The hand-written gradient and norms are those that one gradient per example gives.

    `depth` is the number of stacked axes in front of the parameters: one for all, or a tree prefix.
    Returns the gradient and the norms.
    """

    @jax.jit
    def run(params, batch):
        collect = bh.value_and_collect(objective, gradients=bh.gradients, norms=bh.square_norms)
        collected = collect(params, batch)[1]
        weight = objective.forward(params, batch)[0].weight

        def loss(params, example):
            one = jax.tree.map(lambda leaf: leaf[None], example)
            terms = jax.tree.map(jnp.divide, objective.forward(params, one)[0].total, weight)
            return sum(jax.tree.leaves(terms))

        each = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
        norms = jax.tree.map(
            lambda d, tree: jax.tree.map(lambda g: _squares(g, d), tree), depth, each
        )
        truth = {"gradients": jax.tree.map(lambda g: jnp.sum(g, 0), each), "norms": norms}
        return collected, truth

    collected, truth = run(params, batch)
    assert_close(collected, truth, rtol)
    return collected


def _squares(gradients, depth):
    """Square norms (*depth, B) of per-example gradients (B, *depth, ...)."""
    axes = tuple(range(1 + depth, gradients.ndim))
    return jnp.moveaxis(jnp.sum(gradients**2, axes), 0, -1)


def temporary_bytes(function, *args):
    """The scratch memory of the compiled function."""
    compiled = jax.jit(function).lower(*args).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def residual_bytes(layer, params, x, **side):
    """The bytes of the residuals that a forward saves."""
    saved = jax.make_jaxpr(lambda params, x: layer.forward(params, x, **side)[1])(params, x)
    return sum(aval.size * aval.dtype.itemsize for aval in saved.out_avals)
