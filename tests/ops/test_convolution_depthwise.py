"""Each channel by itself: what XLA's convolutions give, in any blocks, with less memory."""

import functools

import jax
import jax.numpy as jnp
import pytest

import backhand as bh
from backhand.ops import convolution_depthwise, convolution_lax
from backhand.ops.convolution_geometry import geometry
from tests.support import assert_close, normal, temporary_bytes


@pytest.mark.parametrize("limit", [1, 300, 1 << 17])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), ((2, 3), 1), (1, 2)])
def test_any_blocks_give_the_products_of_xla(limit, times, stride, dilation, x64, monkeypatch):
    monkeypatch.setattr(convolution_depthwise, "BLOCK", limit)
    if limit == 300:
        monkeypatch.setattr(convolution_depthwise, "WRITTEN_OUT", 0)
    for name in ("JOINED", "TOGETHER"):
        monkeypatch.setattr(convolution_depthwise, name, limit)
    x, w = normal(0, 5, 7, 8, 3), normal(1, 3, 2, 1, 3 * times)
    windows = geometry("convolution", (7, 8), (3, 2), stride, "SAME", dilation, 3)
    y = normal(2, 5, *windows.places((7, 8), (3, 2)), 3 * times)

    @jax.jit
    def both(x, w, y):
        return [
            (
                module.correlate(x, w, windows),
                module.scatter(y, w, windows, (7, 8)),
                module.weights(x, y, windows, (3, 2)),
            )
            for module in (convolution_depthwise, convolution_lax)
        ]

    assert_close(*both(x, w, y))


def test_low_precision_is_summed_in_float32():
    """After 256, bfloat16 cannot count further by ones."""
    x = jnp.ones((1, 9, 1), jnp.bfloat16).at[0, 0, 0].set(256)
    windows = geometry("convolution", (9,), (9,), 1, "VALID", 1, 1)
    y = convolution_depthwise.correlate(x, jnp.ones((9, 1, 1), jnp.bfloat16), windows)
    assert (y.dtype, y.item()) == (jnp.bfloat16, 264)


def test_it_needs_less_memory_than_autodiff():
    x, w = normal(0, 16, 32, 32, 32), normal(1, 3, 3, 1, 32)
    op = bh.ops.convolution
    ours, theirs = (
        temporary_bytes(jax.grad(lambda x, w, f=f: (f(x, w, groups=32) ** 2).sum(), (0, 1)), x, w)
        for f in (op, op.reference)
    )
    assert ours <= theirs


def test_many_outputs_of_a_channel_are_a_short_program():
    windows = geometry("convolution", (4, 4), (3, 3), 1, "SAME", 1, 2)
    x, y, w = jnp.ones((1, 4, 4, 2)), jnp.ones((1, 4, 4, 512)), jnp.ones((3, 3, 1, 512))

    def both(x, y, w):
        dx = convolution_depthwise.scatter(y, w, windows, (4, 4))
        return dx, convolution_depthwise.weights(x, y, windows, (3, 3))

    assert len(jax.make_jaxpr(both)(x, y, w).eqns) < 1000


def test_a_wide_kernel_is_a_short_program():
    x = jax.ShapeDtypeStruct((8, 32, 64, 16), "float32")
    windows = geometry("convolution", x.shape[1:-1], (1, 64), 1, "SAME", 1, 16)
    run = functools.partial(convolution_depthwise.weights, windows=windows, kernel=(1, 64))
    assert str(jax.make_jaxpr(run)(x, x)).count(" slice[") < 2000
