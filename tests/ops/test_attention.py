"""Attention: who sees whom, heads that share keys, memory, and what is refused."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from tests.support import assert_close, labels, normal, temporary_bytes

attention = bh.ops.attention
attention_module = importlib.import_module("backhand.ops.attention")
attend = jax.jit(attention, static_argnames=("causal", "window", "scale", "soft_cap"))


def arrays(seed, batch=2, tokens=5, heads=2, features=4, keys=None, key_heads=None, dtype=None):
    """q, k and v."""
    shape = (batch, keys or tokens, key_heads or heads, features)
    q = normal(seed, batch, tokens, heads, features, dtype=dtype)
    return q, normal(seed + 1, *shape, dtype=dtype), normal(seed + 2, *shape, dtype=dtype)


# Shapes (B, T, H, D, S, K, shape of the bias) and settings. Some need several blocks of rows, a
# shorter last one, or a head of many queries for each key head.
SETTINGS = {
    "causal": ((2, 7, 4, 4, 7, 2, None), {"causal": True}),
    "full, several blocks": ((1, 70, 2, 2, 130, 2, (1, 1, 70, 130)), {"scale": 0.7}),
    "causal, several blocks": ((1, 150, 2, 2, 133, 1, None), {"causal": True, "soft_cap": 1.5}),
    "window": ((2, 9, 4, 3, 6, 1, (2, 4, 9, 6)), {"window": 3}),
    "causal window": ((3, 6, 2, 1, 6, 2, (1, 2, 6, 6)), {"causal": True, "window": 2}),
    "capped": ((2, 5, 3, 4, 8, 3, (2, 1, 5, 8)), {"soft_cap": 0.5}),
}


def any_setting(seed):
    """One of any shape, with any of what may be set."""
    rng = np.random.default_rng(seed)
    batch, tokens, keys, features, key_heads, group = map(
        int, rng.integers(1, (4, 13, 13, 6, 4, 4))
    )
    heads = key_heads * group
    bias = [(batch, heads, tokens, keys), (1, heads, tokens, keys), (batch, 1, tokens, keys), None]
    static = {"causal": bool(rng.integers(2)), "scale": float(rng.uniform(0.2, 2))}
    static |= {"window": int(rng.integers(1, 6))} if rng.integers(2) else {}
    static |= {"soft_cap": float(rng.uniform(0.3, 3))} if rng.integers(2) else {}
    return (batch, tokens, heads, features, keys, key_heads, bias[rng.integers(4)]), static


SETTINGS |= {f"any {seed}": any_setting(seed) for seed in range(14)}


@functools.cache
def both(name):
    """Output and cotangents of the op and of its reference, compiled for one of the settings."""
    sizes, static = SETTINGS[name]
    *_, bias = sizes

    def one_side(op, floats, integers, dy):
        def function(*floats):
            return op(*floats, *([] if bias else [None]), *integers, **static)

        y, back = jax.vjp(function, *floats)
        return y, back(dy)

    def run(*given):
        return one_side(attention, *given), one_side(attention.reference, *given)

    return jax.jit(run)


@settings(max_examples=220)
@given(name=st.sampled_from(sorted(SETTINGS)), data=st.data())
def test_any_mask_lengths_and_segments_give_the_gradient_of_the_reference(name, data):
    batch, tokens, heads, features, keys, key_heads, bias = SETTINGS[name][0]
    seed = data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, keys)) < data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    lengths = data.draw(st.lists(st.integers(0, keys), min_size=batch, max_size=batch))
    kinds = data.draw(st.integers(1, 3))
    own, others = rng.integers(0, kinds, (batch, tokens)), rng.integers(0, kinds, (batch, keys))
    with jax.enable_x64(True):
        floats = arrays(seed, batch, tokens, heads, features, keys, key_heads)
        floats = (*floats, normal(seed + 3, *bias)) if bias else floats
        integers = [jnp.asarray(x) for x in (mask, np.asarray(lengths), own, others)]
        assert_close(*both(name)(floats, integers, normal(seed + 4, *floats[0].shape)))


@pytest.mark.parametrize(
    ("static", "theirs"),
    [
        ({"causal": True}, {"is_causal": True}),
        ({"causal": True, "window": 2}, {"is_causal": True, "local_window_size": (1, 0)}),
        ({"window": 2, "scale": 0.3}, {"local_window_size": (1, 1), "scale": 0.3}),
    ],
)
@pytest.mark.parametrize("keys", [4, 5, 8])
def test_position_means_what_it_means_in_jax(static, theirs, keys):
    """Keys are counted from the first, whatever their number."""
    given = arrays(0, keys=keys, heads=4, key_heads=2)
    bias = normal(5, 1, 4, 5, keys)
    lengths = jnp.asarray([3, keys])
    expected = jax.nn.dot_product_attention(*given, bias, key_value_seq_lengths=lengths, **theirs)
    y = attend(*given, bias, lengths=lengths, **static)
    some = (jnp.arange(5) < 4)[None, :, None, None]  # JAX gives the mean to who sees no key
    assert_close(jnp.where(some, y, 0), jnp.where(some, expected, 0), 1e-5)


def test_future_tokens_get_no_blame_from_the_past():
    q, k, v = arrays(0, tokens=6, batch=1)
    for t in range(6):
        blame = jax.grad(lambda k, v, t=t: attend(q, k, v, causal=True)[0, t].sum(), (0, 1))
        for error in blame(k, v):
            assert not error[0, t + 1 :].any()
            assert error[0, : t + 1].any() or t == 0


def test_a_window_reaches_just_so_far():
    q, k, v = arrays(0, tokens=6, batch=1)

    def seen(t, causal):
        read = jax.grad(lambda v: attend(q, k, v, causal=causal, window=3)[0, t].sum())
        return read(v).any((0, 2, 3)).nonzero()[0].tolist()

    assert [seen(t, True) for t in (0, 1, 2, 5)] == [[0], [0, 1], [0, 1, 2], [3, 4, 5]]
    assert [seen(t, False) for t in (0, 3)] == [[0, 1, 2], [1, 2, 3, 4, 5]]


def test_padded_keys_get_no_blame_and_do_not_matter():
    q, k, v = arrays(0, keys=7)
    lengths = jnp.asarray([4, 7])
    mask = jnp.arange(7)[None] < lengths[:, None]
    y, back = jax.vjp(lambda k, v: attend(q, k, v, lengths=lengths), k, v)
    for error in back(normal(9, *y.shape)):
        assert not error[0, 4:].any()
        assert error[0, :4].all() and error[1].all()
    other = jnp.where(mask[..., None, None], k, 100.0)
    assert_close(attend(q, other, v, mask=mask), y, 1e-6)
    assert_close(attend(q[:1], k[:1, :4], v[:1, :4]), y[:1], 1e-6)


@pytest.mark.parametrize("how", ["mask", "lengths", "both"])
def test_keys_that_are_not_there_may_be_nan(how, x64):
    """In k and v: neither the output nor any error sees it."""
    q, k, v = arrays(0, keys=7, heads=4, key_heads=2)
    lengths = jnp.asarray([3, 7])
    mask = jnp.arange(7)[None] < lengths[:, None]
    absent = {"mask": mask} if how == "mask" else {"lengths": lengths}
    if how == "both":
        mask = mask & jnp.asarray([[False, *[True] * 6]])
        absent["mask"] = mask

    def both_ways(k, v):
        y, back = jax.vjp(functools.partial(attend, **absent, soft_cap=2.0), q, k, v)
        return y, back(jnp.cos(y))

    there = mask[..., None, None]
    clean = both_ways(*(jnp.where(there, x, 0) for x in (k, v)))
    assert_close(both_ways(*(jnp.where(there, x, jnp.nan) for x in (k, v))), clean)
    assert not any(jnp.where(there, 0, error).any() for error in clean[1][1:])


def test_segments_are_examples_side_by_side(x64):
    q, k, v = arrays(0, batch=1, tokens=7)
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1, 1]])
    packed = attend(q, k, v, segments=segments, causal=True)
    apart = [attend(*(x[:, s] for x in (q, k, v)), causal=True) for s in (np.s_[:3], np.s_[3:])]
    assert_close(packed, jnp.concatenate(apart, 1))


def test_a_query_that_sees_no_key_gives_zeros_and_no_blame(x64):
    """Neither do first and second derivatives of the others' become NaN."""
    q, k, v = arrays(0)
    bias = jnp.zeros((1, 1, 5, 5)).at[0, 0, 2].set(-jnp.inf)
    mask = jnp.asarray([[True] * 5, [False] * 5])

    def loss(q, k, v, bias):
        return jnp.sum(jnp.sin(attend(q, k, v, bias, mask)))

    assert not attend(q, k, v, bias, mask)[1].any()
    assert not attend(q, k, v, bias, mask)[:, 2].any()
    errors = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, bias)
    assert all(jnp.isfinite(error).all() for error in errors)
    assert not any(error[1].any() for error in errors[:3])
    assert not errors[0][:, 2].any() and not errors[3][0, 0, 2].any()
    assert errors[0][0, 0].any()

    def slope(*given):
        return sum(jnp.sum(error**2) for error in jax.grad(loss, (0, 1, 2))(*given, bias))

    assert all(jnp.isfinite(error).all() for error in jax.jit(jax.grad(slope, (0, 1, 2)))(q, k, v))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_heads_that_share_keys_add_up_their_blame(key_heads, x64):
    q, k, v = arrays(0, heads=4, key_heads=key_heads)
    group = 4 // key_heads
    dy = normal(8, *q.shape)
    y, back = jax.vjp(functools.partial(attend, causal=True), q, k, v)
    each, apart = jax.vjp(
        functools.partial(attend, causal=True), q, *(jnp.repeat(x, group, 2) for x in (k, v))
    )
    assert_close(y, each)
    dq, *errors = apart(dy)
    summed = [error.reshape(2, 5, key_heads, group, 4).sum(3) for error in errors]
    assert_close(back(dy), (dq, *summed))


@pytest.mark.parametrize("causal", [False, True])
def test_heads_in_turn_and_blocks_of_rows_are_all_at_once(causal, x64, monkeypatch):
    """As many scores as a test has are taken at once."""
    monkeypatch.setattr(attention_module, "AT_ONCE", 0)
    monkeypatch.setattr(attention_module, "IN_TURN", 1)
    monkeypatch.setattr(attention_module, "SHORT_BLOCK", 16)
    q, k, v = normal(0, 2, 37, 4, 3), normal(1, 2, 37, 2, 3), normal(2, 2, 37, 2, 3)

    def way(run):
        return jax.value_and_grad(lambda *a: jnp.sum(run(*a, causal=causal) ** 2), (0, 1, 2))

    ours, truth = way(bh.ops.attention), way(bh.ops.attention.reference)
    assert_close(jax.jit(ours)(q, k, v), jax.jit(truth)(q, k, v))


def test_memory_grows_as_the_length():
    def both_ways(causal, q, k, v, dy, function=attention):
        y, back = jax.vjp(functools.partial(function, causal=causal), q, k, v)
        return y, back(dy)

    def needs(tokens, **how):
        given = [jax.ShapeDtypeStruct((1, tokens, 2, 8), "float32")] * 4
        return temporary_bytes(functools.partial(both_ways, how.pop("causal"), **how), *given)

    assert needs(2048, causal=False) < 2.1 * needs(1024, causal=False)
    assert needs(2048, causal=False) < 2048 * 2048 * 4 / 2  # half of one matrix of scores
    plain = attention.reference
    assert needs(512, causal=True) < needs(512, causal=True, function=plain) / 3


def test_blocks_side_by_side_have_a_bounded_number_of_scores():
    whole = attention_module.WHOLE
    many = [attention_module.together(scores) for scores in (0, whole, 2 * whole, 64 * whole)]
    assert many == [4, 4, 2, 1]


def test_what_is_kept_for_the_way_back_is_what_came_in_and_two_numbers_a_row():
    q, k, v = arrays(0, heads=4, key_heads=2)
    _, residuals = attention.forward(q, k, v, causal=True)
    assert all(kept is given for kept, given in zip(residuals[:3], (q, k, v), strict=True))
    assert [x.shape for x in residuals.normalizers] == [(2, 2, 5 * 2)] * 2
    s = jnp.einsum("bthd,bhsd->bhts", q, jnp.repeat(jnp.moveaxis(k, 2, 1), 2, 1)) / 2
    s = jnp.where(jnp.tri(5, dtype=bool), s, -jnp.inf)
    top, inverse = (x.reshape(2, 2, 5, 2) for x in residuals.normalizers)
    by_row = jax.nn.logsumexp(s, -1).reshape(2, 2, 2, 5).swapaxes(2, 3)
    assert_close(top - jnp.log(inverse), by_row, 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_softmax_runs_in_float32_whatever_comes_in(dtype):
    """A thousand keys that match alike: in bfloat16 their sum would stop at 256."""
    q = jnp.zeros((1, 1, 1, 8), dtype)
    k = v = jnp.ones((1, 1024, 1, 8), dtype)
    y, residuals = attention.forward(q, k, v)
    top, inverse = residuals.normalizers
    assert (y.dtype, top.dtype, inverse.dtype) == (jnp.dtype(dtype), jnp.float32, jnp.float32)
    assert_close((top[0, 0, 0], inverse[0, 0, 0]), (0.0, 1 / 1024), 1e-6)
    assert (y == 1).all()


def test_large_scores_do_not_overflow():
    q, k, v = arrays(0)
    y, back = jax.vjp(lambda q: attend(1e4 * q, k, v, causal=True), q)
    assert jnp.isfinite(y).all() and jnp.isfinite(back(y)[0]).all()


SHAPES = {"q": (2, 5, 4, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 8)}
WRONG = {
    "heads divisible by key heads, got 4 heads in q and 3": {"k": (2, 6, 3, 8), "v": (2, 6, 3, 8)},
    r"q of shape \(B, T, H, D\) .* got \(2, 5, 8\)": {"q": (2, 5, 8)},
    r"k and v of shape \(B, S, K, D\)": {"v": (2, 6, 2, 4)},
    "at least one token, one key": {"k": (2, 0, 2, 8), "v": (2, 0, 2, 8)},
    r"a bias of shape \(2, 4, 5, 6\), .* got \(4, 5, 6\)": {"bias": (4, 5, 6)},
    r"may be 1, got \(2, 2, 5, 6\)": {"bias": (2, 2, 5, 6)},
    r"mask of shape \(B, S\) = \(2, 6\), .* got \(2, 5\)": {"mask": (2, 5)},
    r"lengths of shape \(B,\) = \(2,\), got \(6,\)": {"lengths": (6,)},
    r"segments of shape \(B, T\) = \(2, 5\), got \(2, 6\)": {"segments": (2, 6)},
    r"key_segments of shape \(B, S\) = \(2, 6\), got \(2, 5\)": {"segments": (2, 5)},
    "segments beside key_segments": {"key_segments": (2, 6)},
}
DTYPES = {"mask": "bool", "lengths": "int32", "segments": "int32", "key_segments": "int32"}


@pytest.mark.parametrize("message", WRONG)
def test_shapes_that_do_not_agree_are_refused(message, unchecked, nothing_compiles):
    given = {
        name: jax.ShapeDtypeStruct(shape, DTYPES.get(name, "float32"))
        for name, shape in {**SHAPES, **WRONG[message]}.items()
    }
    with nothing_compiles(), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda given: attention(**given), given)


def test_settings_and_dtypes_that_mean_nothing_are_refused(unchecked):
    q, k, v = arrays(0)
    ones = jnp.ones((2, 5), jnp.int32)
    for message, static in {
        "window of at least 1, got 0": {"window": 0},
        "a positive soft_cap, got 0": {"soft_cap": 0.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, **static)
    for message, more in {
        "a boolean mask, got int32": {"mask": ones},
        "a mask as an array of booleans, got a list of 2": {"mask": [[True] * 5] * 2},
        "lengths as an array of integers, got a list of 2; jnp.asarray makes": {"lengths": [3, 5]},
        "integer segments, got float32": {"segments": ones.astype(jnp.float32)},
        "integer lengths, got float32": {"lengths": jnp.ones(2)},
        "floating-point bias, got int32": {"bias": jnp.ones((1, 1, 5, 5), jnp.int32)},
    }.items():
        with pytest.raises(TypeError, match=message):
            attention(q, k, v, **more)
        with pytest.raises(TypeError, match=message):
            attention.forward(q, k, v, **more)
    for message, static in {
        r"window of integers, got 1\.5": {"window": 1.5},
        "window of integers, got True": {"window": True},
        "attention's scale must be a number, got 'a'": {"scale": "a"},
        "attention's soft_cap must be a number, got 'a'": {"soft_cap": "a"},
    }.items():
        with pytest.raises(TypeError, match=message):
            attention(q, k, v, **static)
    assert_close(attention(q, k, v, window=np.int64(2)), attend(q, k, v, window=2), 1e-6)


@pytest.mark.parametrize("lengths", [[6, 2], [-1, 2]])
def test_lengths_beyond_the_padding_are_refused_where_they_are_known(lengths):
    q, k, v = arrays(0)
    lengths = jnp.asarray(lengths)
    with pytest.raises(ValueError, match=r"lengths from 0 to 5, the keys .* got -?\d at \[0\]"):
        attention(q, k, v, lengths=lengths)
    inside = jax.jit(attention)(q, k, v, lengths=jnp.maximum(lengths, 0))
    assert jnp.isfinite(inside).all()


def test_segments_may_be_any_integers():
    q, k, v = arrays(0)
    segments = labels(3, 2, 2, 5)
    expected = attend(q, k, v, segments=segments)
    for dtype in ("uint8", "int16"):
        assert_close(attend(q, k, v, segments=segments.astype(dtype)), expected)
