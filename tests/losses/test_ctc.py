"""Connectionist temporal classification: the sum over all paths, which is what its name hides."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import backhand as bh
from backhand.losses.ctc_targets import check
from backhand.metrics import impossible_alignments
from tests.conformance.checks import both_sides
from tests.support import assert_close, assert_gradients_agree, initial, normal

CTC = bh.losses.ctc
B, T, L, V = 4, 5, 3, 4


def targets(labels, label_lengths, input_lengths):
    found = {"labels": labels, "label_lengths": label_lengths, "input_lengths": input_lengths}
    return {name: jnp.asarray(leaf, jnp.int32) for name, leaf in found.items()}


@jax.jit
def both_ways(logits, targets, weights=None):
    """(sum, weight), and the error of the logits for an error of the sum of 1."""
    y, residuals = CTC.forward(logits, targets, weights)
    return y, CTC.backward(residuals, (jnp.ones_like(y[0]), jnp.zeros_like(y[1])))[0]


@jax.jit
def by_reference(logits, targets, weights=None):
    def total(logits):
        total, weight = CTC.reference(logits, targets, weights)
        return total, weight

    (total, weight), dx = jax.value_and_grad(total, has_aux=True)(logits)
    return (total, weight), dx


def read(path, blank=0):
    """What a path reads as: repetitions merged, blanks dropped."""
    return [symbol for symbol, _ in itertools.groupby(path) if symbol != blank]


def by_enumeration(logits, labels, blank=0):
    """-log of the probability of all paths that read as the labels."""
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    paths = itertools.product(range(p.shape[1]), repeat=len(p))
    own = [np.prod(p[range(len(p)), path]) for path in paths if read(path, blank) == labels]
    return -np.log(sum(own)) if own else np.inf


@pytest.mark.parametrize("labels", [[], [1], [3, 1], [2, 2], [1, 2, 1], [3, 3, 3]])
@pytest.mark.parametrize("frames", [1, 3, 5])
def test_it_is_the_sum_over_all_paths_that_read_as_the_labels(x64, labels, frames):
    logits = normal(len(labels), 1, T, V)
    known = targets([[*labels, 0, 0, 0][:L]], [len(labels)], [frames])
    truth = by_enumeration(logits[0, :frames], labels)
    (total, weight), dx = both_ways(logits, known)
    if np.isinf(truth):
        assert (float(total), float(weight)) == (0, 0) and not dx.any()
    else:
        assert float(total) == pytest.approx(truth, rel=1e-12) and float(weight) == 1


def test_any_symbol_may_be_the_blank(x64):
    logits = normal(0, 1, T, V)
    for blank, labels in ((3, [0, 2]), (1, [0, 0])):
        known = {"labels": jnp.asarray([labels])}
        total, _ = CTC(logits, known, blank=blank)
        assert float(total) == pytest.approx(by_enumeration(logits[0], labels, blank), rel=1e-12)


SYMBOLS, FRAMES, LENGTHS = st.integers(1, V - 1), st.integers(0, T), st.integers(0, L)
ERRORS = st.sampled_from([-2.0, 0.0, 0.5])
COMPILED = jax.jit(functools.partial(both_sides, CTC))


@given(
    st.lists(st.sampled_from([-20.0, -1.0, 0.0, 2.0, 20.0]), min_size=T * V, max_size=T * V),
    st.lists(SYMBOLS, min_size=B * L, max_size=B * L),
    st.lists(LENGTHS, min_size=B, max_size=B),
    st.lists(FRAMES, min_size=B, max_size=B),
    st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=B, max_size=B),
    st.tuples(ERRORS, ERRORS),
)
@settings(max_examples=200, deadline=None)
def test_values_and_errors_are_the_references(x, labels, lengths, frames, weights, dy):
    with jax.enable_x64(True):
        logits = jnp.asarray(x).reshape(1, T, V) + normal(1, B, T, V)
        arrays = logits, targets(np.reshape(labels, (B, L)), lengths, frames), jnp.asarray(weights)
        assert_close(*COMPILED(arrays, jax.tree.map(jnp.asarray, dy)), floor=1e-13)


def test_it_is_what_optax_has(x64):
    logits, labels = normal(0, B, T, V), np.asarray([[1, 2, 0], [3, 0, 0], [1, 1, 2], [2, 0, 0]])
    lengths, frames = np.asarray([2, 1, 3, 1]), np.asarray([5, 4, 5, 2])

    def theirs(logits):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            pads = (np.arange(T) >= frames[:, None]), (np.arange(L) >= lengths[:, None])
            pads = [jnp.asarray(pad, float) for pad in pads]
            return optax.ctc_loss(logits, pads[0], jnp.asarray(labels), pads[1]).sum()

    (total, weight), dx = both_ways(logits, targets(labels, lengths, frames))
    assert float(weight) == B
    assert_close((total, dx), jax.value_and_grad(theirs)(logits), 1e-11)


def test_the_blame_of_a_frame_sums_to_zero_and_there_is_none_beyond_the_last(x64):
    logits = normal(0, 2, T, V)
    known = targets([[1, 2, 0], [3, 3, 1]], [2, 3], [3, 5])
    _, dx = both_ways(logits, known)
    np.testing.assert_allclose(dx.sum(-1), 0, atol=1e-12)
    assert not dx[0, 3:].any() and dx[0, :3].all()


def test_what_is_beyond_the_lengths_has_no_effect(x64):
    logits = normal(0, 1, T, V)
    clean = both_ways(logits, targets([[1, 2, 0]], [2], [3]))
    sick = logits.at[:, 3:].set(jnp.nan)
    assert_close(both_ways(sick, targets([[1, 2, -100]], [2], [3])), clean)


def test_labels_that_do_not_fit_are_masked_and_counted(x64):
    logits = normal(0, 3, T, V)
    known = targets([[1, 2, 3], [2, 2, 2], [1, 1, 1]], [3, 3, 3], [3, 4, 5])
    (total, weight), dx = both_ways(logits, known)
    assert float(weight) == 2 and np.isfinite(total)
    assert not dx[1].any() and np.isfinite(dx).all()
    assert [float(n) for n in impossible_alignments(logits, known)] == [1, 3]
    weights = jnp.asarray([1.0, 0.0, 1.0])
    assert [float(n) for n in impossible_alignments(logits, known, weights)] == [0, 2]


@pytest.mark.parametrize("label", [0, V, -1])
def test_a_label_that_means_nothing_is_noticed_unless_it_has_no_weight(label):
    logits, known = normal(0, 2, T, V), targets([[1, label, 0], [2, 1, 0]], [2, 2], [5, 5])
    (total, _), dx = both_ways(logits, known)
    assert np.isnan(total) and np.isfinite(dx).all() and not dx[0].any()
    (total, weight), _ = both_ways(logits, known, jnp.asarray([0.0, 1.0]))
    assert np.isfinite(total) and float(weight) == 1


@pytest.mark.parametrize(
    ("name", "length"),
    [("label_lengths", L + 1), ("label_lengths", -1), ("input_lengths", T + 4)],
)
def test_a_length_outside_the_padding_is_noticed_where_only_the_device_knows_it(name, length):
    logits, known = normal(0, 2, T, V), targets([[1, 2, 1], [2, 1, 0]], [3, 2], [5, 5])
    known[name] = known[name].at[0].set(length)
    (total, weight), dx = both_ways(logits, known)
    assert np.isnan(total) and float(weight) == 2
    assert np.isfinite(dx).all() and not dx[0].any() and dx[1].any()
    weights = jnp.asarray([0.0, 1.0])
    (total, weight), _ = both_ways(logits, known, weights)
    assert np.isfinite(total) and float(weight) == 1
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, \d\], .* got {length} at \[0"):
        CTC(logits, known)
    check(logits, known, weights, 0)


def test_labels_that_no_path_can_say_are_noticed_and_keep_their_weight(x64):
    known = targets([[1, 2, 0], [3, 0, 0], [1, 3, 0]], [2, 1, 2], [5, 5, 5])
    silenced = normal(0, 3, T, V).at[0, :, 2].set(-jnp.inf)
    silenced = silenced.at[1, 1:, 3].set(-jnp.inf).at[2, 2, :3].set(-jnp.inf)
    ours = both_ways(silenced, known)
    assert float(ours[0][0]) == np.inf and float(ours[0][1]) == 3 and not ours[1][0].any()
    others = jax.tree.map(lambda leaf: leaf[1:], (silenced, known))
    (total, weight), dx = both_ways(*others)
    truth = sum(
        by_enumeration(x, labels) for x, labels in zip(others[0], ([3], [1, 3]), strict=True)
    )
    assert float(total) == pytest.approx(truth, rel=1e-12) and float(weight) == 2
    assert_close(ours[1][1:], dx)
    assert float(by_reference(silenced, known)[0][0]) == np.inf


def test_an_example_of_weight_zero_is_left_out_whatever_is_in_it(x64):
    logits, known = normal(0, 2, T, V), targets([[1, 2, 0], [2, 1, 0]], [2, 2], [5, 5])
    weights = jnp.asarray([0.0, 2.0])
    clean = both_ways(logits, known, weights)
    assert_close(both_ways(logits.at[0, 1].set(jnp.nan), known, weights), clean)


def test_long_and_extreme_sequences_stay_finite():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(50 * rng.normal(size=(2, 600, 5)), jnp.float32)
    known = {"labels": jnp.asarray(rng.integers(1, 5, (2, 150)), jnp.int32)}
    (total, weight), dx = both_ways(logits, known)
    assert np.isfinite(total) and float(weight) == 2
    np.testing.assert_allclose(dx.sum(-1), 0, atol=1e-5)


def test_a_model_learns_and_reports_what_cannot_be_aligned(x64):
    model = bh.dense(V)
    loss = bh.objective(model, CTC, metrics={"impossible": impossible_alignments})
    batch = {
        "inputs": normal(0, 3, T, 2),
        "targets": targets([[1, 2, 3], [2, 2, 2], [1, 3, 0]], [3, 3, 2], [3, 4, 5]),
    }
    params = initial(model, batch["inputs"])
    assert_gradients_agree(loss, params, batch)
    measured = jax.jit(lambda params, batch: loss.forward(params, batch)[0].measured())
    assert float(measured(params, batch)["impossible"]) == pytest.approx(1 / 3)
    split, whole = bh.accumulate(bh.value_and_grad(loss), 3), bh.value_and_grad(loss)
    assert_close(jax.jit(split)(params, batch), jax.jit(whole)(params, batch))


def test_what_does_not_fit_is_refused(unchecked, nothing_compiles):
    shape = jax.ShapeDtypeStruct
    logits, labels, one = shape((2, 5, 4), "float32"), shape((2, 3), "int32"), shape((2,), "int32")
    with nothing_compiles():
        for arrays, options, message in (
            ((shape((2, 5), "float32"), {"labels": labels}), {}, r"\(B, T, V\)"),
            ((shape((2, 0, 4), "float32"), {"labels": labels}), {}, "with a frame"),
            ((logits, {"labels": one}), {}, r"labels of shape \(2, L\)"),
            ((logits, {"labels": shape((3, 3), "int32")}), {}, r"got \(3, 3\)"),
            ((logits, {"labels": labels, "input_lengths": labels}), {}, "input_lengths of shape"),
            ((logits, {"labels": labels}, shape((2, 5), "float32")), {}, "weights of shape"),
            ((logits, {"labels": labels}), {"blank": 4}, r"blank in \[0, 4\), got 4"),
        ):
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(CTC.bind(**options), *arrays)
        for arrays, message in (
            ((shape((2, 5, 4), "int32"), {"labels": labels}), "floating-point logits, got int32"),
            ((logits, labels), "targets as a dict with 'labels'"),
            ((logits, {"label": labels}), "a dict of 'label'"),
            ((logits, {"labels": shape((2, 3), "float32")}), r"targets\['labels'\], got float32"),
        ):
            with pytest.raises(TypeError, match=message):
                jax.eval_shape(CTC, *arrays)
