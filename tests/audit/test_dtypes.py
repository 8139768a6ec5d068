"""What a program computes in, apart from what it only moves, and from random bits."""

import jax
import jax.numpy as jnp
import pytest

from backhand.audit.dtypes import coarsest, programs
from tests.support import normal

X = normal(0, 4)
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def low(x):
    return jnp.sin(x.astype(jnp.bfloat16)).astype(x.dtype)


CASES = {
    "nothing": (lambda x: x, (None, None)),
    "its own": (jnp.sin, (F32, F32)),
    "a cast alone": (lambda x: 2 * x.astype(jnp.bfloat16).astype(x.dtype), (F32, BF16)),
    "a cast and a function": (low, (BF16, BF16)),
    "inside of jit": (jax.jit(low), (BF16, BF16)),
    "inside of a scan": (
        lambda x: jax.lax.scan(lambda c, _: (low(c), None), x, length=2)[0],
        (BF16, BF16),
    ),
    "inside of a branch": (lambda x: jax.lax.cond(x[0] > 0, low, jnp.sin, x), (BF16, BF16)),
    "random bits": (
        lambda x: x * jax.random.uniform(jax.random.key(0), (4,), jnp.bfloat16).astype(x.dtype),
        (F32, F32),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_coarsest_dtype_on_the_way_from_the_arrays(name):
    function, expected = CASES[name]
    assert coarsest(function, X) == expected


def test_what_other_arguments_go_through_does_not_count():
    assert coarsest(lambda x, y: x + low(y), X, X).computed == F32
    assert coarsest(lambda xs: xs[0] + low(xs[1]), (X, X)).computed == BF16


def test_programs_inside_of_an_equation_are_found():
    (equation,) = jax.make_jaxpr(jax.jit(jnp.sin))(X).jaxpr.eqns
    (inner,) = programs(equation.params.values())
    assert [str(each.primitive) for each in inner.eqns] == ["sin"]
