"""Windows: how many there are, which elements each holds, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhand.ops.pooling_windows import over_slots, padded, pooling_windows, spread


def described(size, window, stride, padding):
    x = jax.ShapeDtypeStruct((1, size, 1), "float32")
    return pooling_windows("a pool", x, (window,), (stride,), padding)


def elements(windows):
    """By hand: the elements of each window, None for padding."""
    (size,), (k,), (s,), ((before, after),) = (
        windows.sizes,
        windows.window,
        windows.stride,
        windows.padding,
    )
    line = [None] * before + list(range(size)) + [None] * after
    return [line[start : start + k] for start in range(0, len(line) - k + 1, s)]


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.data())
def test_slots_visit_every_element_of_every_window_and_spread_goes_back(size, window, stride, data):
    pads = data.draw(st.tuples(*[st.integers(0, window - 1)] * 2))
    lean = data.draw(st.booleans())
    if window > size + sum(pads):
        return
    windows = described(size, window, stride, (pads,))
    truth = elements(windows)
    assert windows.outputs == (len(truth),)
    for first, count, slots in windows.runs[0]:
        for own in truth[first : first + count]:
            assert [own[slot] for slot in slots] == [e for e in own if e is not None]
    assert sum(count for _, count, _ in windows.runs[0]) == len(truth)
    with jax.disable_jit():
        x = padded(jnp.arange(size, dtype=jnp.float32).reshape(1, -1, 1), windows, np.nan)
        seen = over_slots(lambda n, v, all: [*all, v.ravel()], [], x, windows)
        expected = [[np.nan if e is None else e for e in own] for own in truth]
        np.testing.assert_array_equal(np.stack(seen, 1), np.array(expected, np.float32))

        blame = jnp.asarray(10.0 ** np.arange(len(truth)), jnp.float32).reshape(1, -1, 1)

        def share(slots, dy):
            return dy * (jnp.asarray(slots[0], dy.dtype) + 1)

        dx = spread(share, (blame,), windows, lean).ravel()
    got = np.zeros(size)
    for i, own in enumerate(truth):
        for slot, e in enumerate(own):
            if e is not None:
                got[e] += 10.0**i * (slot + 1)
    np.testing.assert_allclose(dx, got, rtol=1e-6)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 6))
def test_same_padding_gives_a_window_for_every_step_and_is_that_of_jax(size, window, stride):
    windows = described(size, window, stride, "SAME")
    assert windows.outputs == (-(-size // stride),)
    assert list(windows.padding) == jax.lax.padtype_to_pads((size,), (window,), (stride,), "SAME")


@pytest.mark.parametrize("lean", [False, True])
def test_many_slots_and_shifts_are_a_loop_with_the_same_result(lean, monkeypatch):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 6, 3)), jnp.float32)
    windows = pooling_windows("a pool", x, (3, 2), (1, 1), "VALID")

    def run():
        y = over_slots(lambda n, v, y: v if y is None else y + v, None, x, windows)
        return y, spread(lambda slots, dy: dy, (y,), windows, lean)

    written_out = run()
    monkeypatch.setattr("backhand.ops.pooling_windows.UNROLLED", 1)
    assert "scan" in str(jax.make_jaxpr(run)()) or "while" in str(jax.make_jaxpr(run)())
    for a, b in zip(run(), written_out, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "how", "message"),
    [
        ((32, 28, 28), ((2, 2), None, "VALID"), r"x \(32, 28, 28\).*batch axis .* channel axis"),
        ((1, 4, 4, 4, 4, 1), ((2,) * 4, None, "VALID"), "1 to 3 spatial axes"),
        ((1, 8, 1), ((0,), None, "VALID"), r"a window of at least 1, got \(0,\)"),
        ((1, 8, 1), ((2,), (0,), "VALID"), r"a stride of at least 1, got \(0,\)"),
        ((1, 8, 8, 1), ((2, 2), (2,), "VALID"), r"a stride as one integer or 2, .* got \(2,\)"),
        ((1, 3, 1), ((4,), None, "VALID"), r"got window \(4,\) over x \(1, 3, 1\)"),
        ((1, 0, 1), ((2,), None, ((1, 1),)), "a window within its padded input"),
        ((1, 8, 1), ((2,), None, ((2, 0),)), r"less than the window \(2,\).*got \(\(2, 0\),\)"),
        ((1, 8, 1), ((2,), None, ((-1, 0),)), "a pair of at least 0 in front and behind"),
        ((1, 8, 1), ((2,), None, "same"), "padding 'SAME', 'VALID', or .*got 'same'"),
        ((1, 8, 1), ((2,), None, ((1, 1), (1, 1))), "for each of the 1 spatial axes"),
        ((1, 8, 8, 1), (2, None, 1), r"for each of the 2 .*as in \[\(1, 1\), \(1, 1\)\]; got 1"),
    ],
)
def test_what_does_not_fit_is_refused(shape, how, message, unchecked):
    with pytest.raises(ValueError, match=f"a pool needs.*{message}"):
        pooling_windows("a pool", jax.ShapeDtypeStruct(shape, "float32"), *how)
    with pytest.raises(TypeError, match="a pool needs floating-point input, got int32"):
        pooling_windows("a pool", jax.ShapeDtypeStruct(shape, "int32"), *how)
