"""What every recurrent op promises: lengths, directions, states, and what it refuses."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import backhand as bh
from backhand.catalogue import ROWS
from backhand.ops.recurrent import Sweep, sweep_of
from tests.conformance import test_gradients, test_meshes, test_transforms
from tests.conformance.checks import faults
from tests.ops.reference import assert_is_its_reference
from tests.support import assert_close, normal, random_like

GATES = {"lstm": 4, "gru": 3, "elman": 1}
STEPS, FEATURES, UNITS = 5, 2, 3


def weights(name, seed=0, dtype=None):
    """The weights and biases of an op."""
    g = GATES[name] * UNITS
    shapes = [(FEATURES, g), (UNITS, g), (g,), *([(UNITS,)] if name == "gru" else [])]
    return [normal(seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def state_of(name, batch, seed=20):
    h, c = normal(seed, batch, UNITS), normal(seed + 1, batch, UNITS)
    return (h, c) if name == "lstm" else h


SETTINGS = [  # (B, T, D, H), whether backwards, with a state, with lengths
    ((3, 5, 2, 3), False, True, True),
    ((3, 5, 2, 3), True, False, False),
    ((17, 5, 2, 3), True, True, True),
    ((16, 2, 3, 1), False, False, True),
    ((1, 1, 1, 1), False, True, False),
    ((2, 7, 1, 4), True, False, True),
    ((4, 3, 5, 2), True, True, False),
    ((18, 4, 1, 2), False, False, False),
]


@settings(max_examples=200)
@given(st.sampled_from(sorted(GATES)), st.sampled_from(SETTINGS), st.integers(0, 1000))
def test_any_sizes_lengths_and_direction(name, setting, seed):
    """Products are turned in those whose weights outweigh the sequences."""
    (batch, steps, features, units), reverse, begun, padded = setting
    random = np.random.default_rng(seed)
    g = GATES[name] * units
    shapes = [(features, g), (units, g), (g,), *([(units,)] if name == "gru" else [])]
    arrays = [random.standard_normal(own) for own in ((batch, steps, features), *shapes)]
    h, c = random.standard_normal((2, batch, units))
    state = ((h, c) if name == "lstm" else h) if begun else None
    lengths = random.integers(0, steps + 1, batch) if padded else None
    op = getattr(bh.ops, name)
    assert_is_its_reference(op, (*arrays, state, lengths), seed, reverse=reverse)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_padded_sequence_is_the_sequence_alone(name, reverse, x64):
    """Whatever the padding holds, and it gets no blame."""
    op, own = getattr(bh.ops, name), weights(name)
    lengths, x = jnp.array([3, 5, 0]), normal(9, 3, STEPS, FEATURES)
    padded = x.at[0, 3:].set(jnp.nan)
    state = state_of(name, 3)
    (y, last), residuals = op.forward(padded, *own, state, lengths, reverse=reverse)
    dy = random_like((y, last))
    dx, *dweights = op.backward(residuals, dy, reverse=reverse)
    for i, n in enumerate([3, 5, 0]):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (x[:, :n], state))
        alone = op.reference(one[0], *own, one[1], reverse=reverse)
        got = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (y[:, :n], last))
        assert_close(got, alone)
        assert not y[i, n:].any() and not dx[i, n:].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dweights))


@pytest.mark.parametrize("name", GATES)
def test_one_sweep_over_two_windows_is_one_over_both(name, x64):
    op, own, x = getattr(bh.ops, name), weights(name), normal(9, 3, STEPS, FEATURES)
    whole = op(x, *own)
    first, state = op(x[:, :2], *own)
    second, last = op(x[:, 2:], *own, state)
    assert_close((jnp.concatenate([first, second], 1), last), whole)


@pytest.mark.parametrize("name", GATES)
def test_the_future_gets_no_blame_from_the_past(name):
    op, own, x = getattr(bh.ops, name), weights(name), normal(9, 3, STEPS, FEATURES)
    for reverse, future in ((False, slice(3, None)), (True, slice(0, 2))):
        blame = jax.grad(lambda x, reverse=reverse: op(x, *own, reverse=reverse)[0][:, 2].sum())(x)
        assert not blame[:, future].any() and blame[:, 2].any()


@pytest.mark.parametrize("name", GATES)
def test_no_step_leaves_the_state_as_it_is(name, x64):
    op, own, state = getattr(bh.ops, name), weights(name), state_of(name, 3)
    (y, last), residuals = op.forward(jnp.zeros((3, 0, FEATURES)), *own, state)
    dy = random_like((y, last))
    dx, *dweights, dstate, _ = op.backward(residuals, dy)
    assert_close((last, dstate), (state, dy[1]))
    assert dx.shape == (3, 0, FEATURES) and not any(leaf.any() for leaf in dweights)


@pytest.mark.parametrize("name", GATES)
def test_low_precision_carries_its_state_in_float32(name):
    """Over 200 steps as near to float64 as bfloat16 inputs and weights allow."""
    op = getattr(bh.ops, name)
    own = [0.3 * w.astype(jnp.bfloat16) for w in weights(name)]
    x = normal(9, 2, 200, FEATURES, dtype=jnp.bfloat16)
    ours, theirs = op(x, *own)[0], op.reference(x, *own)[0]
    with jax.enable_x64(True):
        exact = op.reference(*(jnp.asarray(np.asarray(leaf, np.float64)) for leaf in (x, *own)))[0]
    off = [float(np.abs(np.asarray(y, float) - np.asarray(exact)).max()) for y in (ours, theirs)]
    assert ours.dtype == jnp.bfloat16 and off[0] <= off[1]


def test_a_turned_product_is_the_product():
    h, w = normal(0, 3, 4), normal(1, 4, 6)
    for turned in (False, True):
        assert_close(Sweep(turned, False).times(w)(h), h @ w, 1e-6)


def test_a_step_in_low_precision_does_not_convert_the_whole_sequence():
    def step(h, x):
        return h + x.astype(jnp.float32), h.astype(jnp.bfloat16)

    def run(h, xs):
        return Sweep(False, False).run(step, h, xs)

    xs = jnp.ones((4, 5, 3), jnp.bfloat16)
    compiled = jax.jit(run).lower(jnp.zeros((4, 3)), xs).compile()
    written = re.findall(r"dynamic-update-slice\(%?([a-z]+)", compiled.as_text())
    assert written and "convert" not in written
    assert compiled(jnp.zeros((4, 3)), xs)[1].dtype == jnp.bfloat16


# The catalogue's layers are small. Here their products are turned, as those of large ones are.
TURNED = {row.name: row for row in ROWS if row.name in {f"ops.{n}" for n in GATES}}.values()
CHECKS = {
    "one after the other": faults,
    "twice differentiated": test_gradients.test_jax_grad_of_the_call_runs_the_hand_written_backward,
    "vmap and scan": test_transforms.test_vmap_and_scan_give_what_one_call_after_the_other_gives,
    "explicit axes": test_meshes.test_on_explicit_axes_a_cotangent_is_split_as_its_primal,
    "split parameters": lambda row: (
        test_meshes.test_parameters_may_be_split_over_any_axis_of_the_mesh(row, "data")
    ),
    "shard_map": (
        test_meshes.test_inside_shard_map_a_replicated_weight_gets_the_sum_over_the_shards
    ),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("row", TURNED, ids=repr)
def test_large_layers_are_held_to_what_small_ones_are(row, check, x64, monkeypatch):
    monkeypatch.setattr("backhand.ops.recurrent.TURNED_FROM", 0)
    assert not CHECKS[check](dataclasses.replace(row))


def shape(*axes, dtype="float32"):
    return jax.ShapeDtypeStruct(axes, dtype)


def good(name):
    g = GATES[name] * 3
    bn = {"bn": shape(3)} if name == "gru" else {}
    own = {"x": shape(4, 5, 2), "wx": shape(2, g), "wh": shape(3, g), "b": shape(g), **bn}
    state = (shape(4, 3), shape(4, 3)) if name == "lstm" else shape(4, 3)
    return {**own, "state": state, "lengths": shape(4, dtype="int32")}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize(
    ("argument", "wrong", "error", "message"),
    [
        ("x", shape(5, 2), ValueError, r"needs x of shape \(B, T, D\), got \(5, 2\)"),
        ("x", shape(4, 5, 2, dtype="int32"), TypeError, "needs floating-point input, got int32"),
        (
            "wh",
            shape(3, 3, dtype="int32"),
            TypeError,
            r"floating-point wh, got .* wh\.astype",
        ),
        ("wx", shape(7, 3), ValueError, r"needs weights wx .* got \(7, 3\) and"),
        ("wh", shape(3, 5), ValueError, r"needs weights .* \(4, 5, 2\), got .* and \(3, 5\)"),
        ("b", shape(2), ValueError, r"needs b of shape \(\d+,\), got \(2,\)"),
        ("lengths", shape(3, dtype="int32"), ValueError, r"\(B,\) = \(4,\), got \(3,\)"),
        ("lengths", shape(4, 5, dtype="bool"), TypeError, r"integer lengths, got bool .* mask"),
        ("lengths", shape(4), TypeError, "needs integer lengths"),
    ],
)
def test_what_does_not_fit_is_refused(
    name, argument, wrong, error, message, unchecked, nothing_compiles
):
    with nothing_compiles(), pytest.raises(error, match=f"{name} needs|{message}") as raised:
        jax.eval_shape(getattr(bh.ops, name), *{**good(name), argument: wrong}.values())
    assert name in str(raised.value) and raised.match(message)


@pytest.mark.parametrize("name", GATES)
def test_a_state_of_another_shape_is_refused(name, unchecked):
    wrong = shape(3, 3)
    state = (shape(4, 3), wrong) if name == "lstm" else wrong
    with pytest.raises(ValueError, match=rf"{name} needs the state . .* \(4, 3\), got \(3, 3\)"):
        jax.eval_shape(getattr(bh.ops, name), *{**good(name), "state": state}.values())


@pytest.mark.parametrize("name", GATES)
def test_a_state_of_another_structure_is_refused(name, unchecked):
    one = shape(4, 3)
    state = one if name == "lstm" else (one, one)
    expected = (
        r"state as a pair .* got an array of shape \(4, 3\)"
        if name == "lstm"
        else r"one array \(4, 3\) .* tuple of 2"
    )
    with pytest.raises(ValueError, match=rf"{name} needs .*{expected}"):
        jax.eval_shape(getattr(bh.ops, name), *{**good(name), "state": state}.values())


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("lengths", [[1, 6, 2], [0, -1, 2]])
def test_lengths_beyond_the_padding_are_refused_where_they_are_known(name, lengths):
    op = getattr(bh.ops, name)
    arrays = (normal(0, 3, STEPS, FEATURES), *weights(name), None, jnp.array(lengths))
    with pytest.raises(ValueError, match=f"{name} needs lengths from 0 to 5, the steps of x; got"):
        op.forward(*arrays)
    y, _ = jax.jit(op)(*arrays)  # unknown: as if cut to what there is
    assert np.isfinite(y[0]).all()


@pytest.mark.parametrize(
    ("batch", "steps", "units", "turned"),
    [(32, 50, 512, True), (32, 50, 256, False), (1, 32, 128, True), (8, 50, 128, False)],
)
def test_products_are_turned_of_large_weights_and_of_those_heavier_than_the_sequences(
    batch, steps, units, turned, unchecked
):
    x, wh = shape(batch, steps, 1), shape(units, 4 * units)
    assert sweep_of(x, wh, False).turned is turned
