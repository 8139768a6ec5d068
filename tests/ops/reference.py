"""An op against its reference, for values that vary under a program compiled once a setting."""

import functools

import jax
import jax.numpy as jnp

import backhand as bh
from tests.support import assert_close, random_like


def assert_is_its_reference(op, arrays, seed=0, floor=None, **static):
    """In float64, y and every cotangent of a random dy are those of `jax.vjp` of the reference.

    `arrays` are NumPy arrays, keys or None; what is not floating point has no cotangent.
    """
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, arrays)
        leaves, structure = jax.tree.flatten(arrays)
        types = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        run, y = _program(op, structure, types, tuple(sorted(static.items())))
        ours, truth = run(leaves, random_like(y, seed))
        assert_close(ours, truth, floor=floor)


@functools.cache
def _program(op, structure, types, static):
    """Both sides, compiled, and the shapes of y."""
    how, floating = dict(static), [bh.arrays.is_floating(jax.ShapeDtypeStruct(*t)) for t in types]

    def run(leaves, dy):
        arrays = structure.unflatten(leaves)
        y, residuals = op.forward(*arrays, **how)
        ours = y, jax.tree.leaves(op.cotangents(residuals, dy, **how))

        def reference(floats):
            rest = iter(floats)
            own = [next(rest) if f else leaf for leaf, f in zip(leaves, floating, strict=True)]
            return op.reference(*structure.unflatten(own), **how)

        truth, back = jax.vjp(
            reference, [leaf for leaf, f in zip(leaves, floating, strict=True) if f]
        )
        return ours, (truth, back(dy)[0])

    shapes = [jax.ShapeDtypeStruct(*t) for t in types]
    y = jax.eval_shape(lambda leaves: op.reference(*structure.unflatten(leaves), **how), shapes)
    return jax.jit(run), y
