"""The objective: one scalar of a batch, both ways to its gradient, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from tests.support import assert_close, assert_gradients_agree, labels, normal, spread

MODEL = bh.chain(hidden=bh.dense(5), act=bh.tanh(), out=bh.dense(3))
LOSS = bh.losses.softmax_cross_entropy
OBJECTIVE = bh.objective(MODEL, LOSS)


def classes(batch=6, **more):
    return {"inputs": normal(0, batch, 4), "targets": labels(1, 3, batch), **more}


def made(objective, batch):
    return spread(objective.init(jax.random.key(0), batch))


def test_the_loss_is_the_mean_and_its_gradient_that_of_autodiff(x64):
    batch = classes()
    params = made(OBJECTIVE, batch)
    assert_gradients_agree(OBJECTIVE, params, batch)

    @jax.jit
    def run(params, batch):
        logits = jax.nn.log_softmax(MODEL(params, batch["inputs"]))
        expected = -jnp.mean(jnp.take_along_axis(logits, batch["targets"][:, None], 1))
        automatic = bh.value_and_grad(OBJECTIVE, gradients="automatic")
        both = [evaluate(params, batch) for evaluate in (bh.value_and_grad(OBJECTIVE), automatic)]
        return expected, OBJECTIVE(params, batch), bh.grad(OBJECTIVE)(params, batch), both

    expected, value, grads, both = run(params, batch)
    assert_close(value, expected)
    for pair in both:
        assert_close(pair, (expected, grads))


@pytest.mark.parametrize(
    "weights", [[1.0, 0, 2, 0.5, 0, 3], [True, False, True, True, False, False]], ids=str
)
def test_examples_of_weight_zero_might_as_well_be_absent(x64, weights):
    weights = jnp.asarray(weights)
    batch = classes()
    params = made(OBJECTIVE, batch)
    sick = batch["inputs"].at[1].set(jnp.nan).at[4].set(jnp.inf)
    weighted = {**batch, "inputs": sick, "weights": weights}
    evaluate = jax.jit(bh.value_and_grad(OBJECTIVE))
    seen = np.flatnonzero(np.asarray(weights))
    alone = jax.tree.map(lambda leaf: leaf[seen], {**batch, "weights": weights})
    clean = evaluate(params, {**batch, "weights": weights})
    assert_close(clean, evaluate(params, alone))
    assert_gradients_agree(OBJECTIVE, params, {**batch, "weights": weights})
    value, _ = evaluate(params, weighted)
    assert_close(value, clean[0])


def test_nothing_seen_is_a_loss_of_zero_with_a_gradient_of_zero():
    batch = classes(weights=jnp.zeros(6))
    params = made(OBJECTIVE, batch)
    for evaluate in (
        bh.value_and_grad(OBJECTIVE),
        bh.value_and_grad(OBJECTIVE, gradients="automatic"),
        jax.value_and_grad(OBJECTIVE),
    ):
        value, grads = jax.jit(evaluate)(params, batch)
        assert float(value) == 0
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_evaluation_needs_no_key_and_drops_nothing(x64):
    objective = bh.objective(bh.chain(bh.dropout(0.5), bh.dense(3)), LOSS)
    batch = classes()
    params = made(objective, batch)
    plain = bh.objective(bh.chain(bh.tanh(), bh.dense(3)), LOSS)
    still = {"training": False}
    assert_gradients_agree(objective, params, batch, **still)
    assert_gradients_agree(objective, params, batch, key=jax.random.key(1))
    assert objective(params, batch, training=False) != plain(params, batch)
    assert objective(params, batch, key=jax.random.key(1)) != objective(params, batch, **still)


def test_a_metric_reports_and_changes_no_gradient(x64):
    batch = classes()
    params = made(OBJECTIVE, batch)
    metrics = {"same": LOSS, "accuracy": bh.metrics.accuracy}
    terms, collected = bh.value_and_grad(bh.objective(MODEL, LOSS, metrics=metrics)).evaluate(
        params, batch
    )
    assert_close(terms.measured()["same"], OBJECTIVE(params, batch))
    assert_close(collected["gradients"], bh.grad(OBJECTIVE)(params, batch))


def test_numpy_batches_and_second_derivatives_work(x64):
    batch = jax.tree.map(np.asarray, classes())
    params = made(OBJECTIVE, batch)
    direction = spread(params, 3)

    @jax.jit
    def curvature(params):
        tangents = [
            jax.jvp(lambda p, g=g: g(p, batch), (params,), (direction,))[1]
            for g in (bh.grad(OBJECTIVE), jax.grad(OBJECTIVE))
        ]
        return tangents

    assert_close(*curvature(params))


def side_model():
    """Reads a mask from the batch."""

    def forward(params, x, *, source_mask):
        return jnp.where(source_mask, x, 0), source_mask

    rule = lambda params, mask, dy, *, source_mask: ((), jnp.where(mask, dy, 0))  # noqa: E731
    masked = bh.layer("masked", lambda key, x: (), forward, rule)
    return bh.chain(masked, bh.dense(3))


def test_what_a_model_uses_comes_from_the_batch(x64):
    objective = bh.objective(side_model(), LOSS)
    mask = normal(5, 6, 4) > 0
    params = made(objective, classes(source_mask=mask))
    assert_gradients_agree(objective, params, classes(source_mask=mask))
    cut = classes() | {"inputs": jnp.where(mask, classes()["inputs"], 0)}
    plain = bh.objective(bh.chain(bh.tanh(), bh.dense(3)), LOSS)
    assert plain(params, cut) != objective(params, classes(source_mask=mask))
    everything = classes(source_mask=jnp.ones((6, 4), bool)) | {"inputs": cut["inputs"]}
    assert objective(params, everything) == objective(params, classes(source_mask=mask))


# Bad input ----------------------------------------------------------------------------------------

GOOD = {"inputs": np.zeros((7, 4), np.float32), "targets": np.zeros(7, np.int32)}
ZEROS = jax.tree.map(
    lambda shape: jnp.asarray(np.zeros(shape, np.float32)),
    {"hidden": {"w": (4, 5), "b": (5,)}, "act": (), "out": {"w": (5, 3), "b": (3,)}},
    is_leaf=lambda node: isinstance(node, tuple) and node != (),
)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": None}, ValueError, r"a batch needs 'inputs', got 'targets'"),
        ({"targets": None}, ValueError, r"a batch needs 'targets', got 'inputs'"),
        ({"weight": np.ones(7)}, ValueError, r"holds 'weight', .*; did you mean 'weights'\?"),
        ({"mask": np.ones(7)}, ValueError, r"'mask', which the model does not use; it uses 'inp"),
        (
            {"targets": np.zeros(6, np.int32)},
            ValueError,
            r"one common first axis, got .*\['inputs'\]: \(7,\), \['targets'\]: \(6,\)",
        ),
        ({"weights": np.float32(1)}, ValueError, r"common first axis, .*\['weights'\]: a scalar"),
        (
            {"inputs": np.zeros((7, 9), np.float32)},
            ValueError,
            r"linear needs x of shape \(..., 4\) for weights \(4, 5\), got \(7, 9\)",
        ),
        ({"inputs": np.zeros((7, 4), np.int32)}, TypeError, r"floating-point input, got int32 of"),
        (
            {"inputs": np.zeros((7, 2, 4), np.float32)},
            ValueError,
            r"for logits \(7, 2, 3\), integer labels of shape \(7, 2\) .*; got int32 of shape \(7,",
        ),
        ({"targets": np.full(7, 3)}, ValueError, r"labels must lie in \[0, 3\).*got 3 at \[0\]"),
        (
            {"targets": np.arange(7) - 1},
            ValueError,
            r"got -1 at \[0\]; give a position .* weight 0",
        ),
        ({"weights": np.arange(7) - 2.0}, ValueError, r"must be 0 or more, got -2.0 at \[0\]"),
        (
            {"weights": np.ones((7, 2), np.float32)},
            ValueError,
            r"weights whose shape begins as that of the positions \(7,\): .*; got \(7, 2\)",
        ),
    ],
)
def test_a_bad_batch_is_refused_before_anything_compiles(
    unchecked, nothing_compiles, change, error, message
):
    batch = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    for run in (OBJECTIVE, bh.value_and_grad(OBJECTIVE), bh.grad(OBJECTIVE)):
        with nothing_compiles(), pytest.raises(error, match=message):
            run(ZEROS, batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones(7)}, "did you mean 'weights'"),
        ({"targets": np.zeros(6, np.int32)}, "one common first axis"),
        ({"targets": np.full(7, 3)}, r"labels must lie in \[0, 3\)"),
    ],
)
def test_init_refuses_a_bad_batch_too(nothing_compiles, change, message):
    key = jax.random.key(0)
    with nothing_compiles(), pytest.raises(ValueError, match=message):
        OBJECTIVE.init(key, {**GOOD, **change})


def test_labels_without_weight_may_be_out_of_range():
    batch = GOOD | {"targets": np.full(7, -1, np.int32), "weights": np.zeros(7, np.float32)}
    batch["targets"][3], batch["weights"][3] = 1, 1
    value, grads = jax.jit(lambda params: bh.value_and_grad(OBJECTIVE)(params, batch))(ZEROS)
    assert float(value) == pytest.approx(np.log(3))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_values_are_checked_again_for_every_batch():
    assert float(OBJECTIVE(ZEROS, GOOD)) == pytest.approx(np.log(3))
    with pytest.raises(ValueError, match="got 5 at"):
        OBJECTIVE(ZEROS, GOOD | {"targets": np.full(7, 5, np.int32)})


def test_what_is_no_objective_is_refused(unchecked, nothing_compiles):
    noisy = bh.objective(bh.chain(bh.dropout(0.5), MODEL), LOSS)
    raw = np.zeros(2, np.uint32)
    with nothing_compiles():
        with pytest.raises(
            TypeError, match=r"a sum and a weight, such as bh\.losses\.mean_squared"
        ):
            bh.objective(MODEL, lambda y, t: jnp.mean((y - t) ** 2))
        with pytest.raises(TypeError, match=r"bh\.linear_cross_entropy_objective\(trunk, vocab"):
            bh.objective(MODEL, bh.losses.linear_cross_entropy)
        with pytest.raises(ValueError, match="'manual' or 'automatic', got 'auto'"):
            bh.value_and_grad(OBJECTIVE, gradients="auto")
        with pytest.raises(TypeError, match=r"a batch is a dict with 'inputs' and .*, got tuple"):
            OBJECTIVE(ZEROS, (GOOD["inputs"], GOOD["targets"]))
        with pytest.raises(ValueError, match=r"a key while training: pass key=jax.random.key\(s"):
            bh.value_and_grad(noisy)(((), ZEROS), GOOD)
        with pytest.raises(TypeError, match=r"must be typed, made by jax\.random\.key.*got uint32"):
            bh.value_and_grad(noisy)(((), ZEROS), GOOD, key=raw)
        with pytest.raises(TypeError, match="a metric gives"):
            wrong = bh.objective(MODEL, LOSS, metrics={"top": lambda *args: jnp.max(args[0])})
            jax.eval_shape(lambda: bh.value_and_grad(wrong).evaluate(ZEROS, GOOD))


def test_the_check_that_nothing_compiles_can_fail(nothing_compiles):
    with pytest.raises(AssertionError, match="compiled"), nothing_compiles():
        jax.jit(lambda x: x * 3.14159 + 2.71828)(np.ones(17))


def test_a_missing_or_wrong_key_is_refused_before_anything_compiles(nothing_compiles):
    objective = bh.objective(
        bh.chain(bh.dense(4), bh.dropout(0.5), bh.dense(3)), bh.losses.softmax_cross_entropy
    )
    batch = {name: np.asarray(leaf) for name, leaf in classes().items()}
    params, raw = made(objective, batch), jax.random.PRNGKey(0)
    for call in (objective, bh.value_and_grad(objective), bh.grad(objective)):
        with nothing_compiles(), pytest.raises(ValueError, match="dropout needs a key"):
            call(params, batch)
        with nothing_compiles(), pytest.raises(TypeError, match="key must be typed"):
            call(params, batch, key=raw)


def test_automatic_gradients_refuse_labels_out_of_range_too(nothing_compiles):
    objective = bh.objective(bh.dense(3), bh.losses.softmax_cross_entropy)
    batch = {name: np.asarray(leaf) for name, leaf in classes().items()}
    params = made(objective, batch)
    wrong = {**batch, "targets": batch["targets"] + 3}
    with nothing_compiles(), pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        jax.value_and_grad(objective)(params, wrong)


def reader(vocabulary=5):
    """Reads ids of its batch in places of different depth, and lengths by name."""
    tokens = bh.embedding(vocabulary, 4)
    pick = bh.Layer(
        "pick",
        lambda key, x: tokens.init(key, x["source"]),
        lambda params, x: tokens.forward(params, x["source"]),
        lambda params, ids, dy, collect: tokens.backward(params, ids, dy, collect),
    )
    body = bh.repeat(bh.skip(bh.rename(bh.lstm(4), lengths="source_lengths")), 2)
    model = bh.chain(tokens=pick, body=body, logits=bh.unembedding(vocabulary))
    return bh.share(model, {"logits/table": "tokens/table"})


IDS = np.asarray([[0, 4, -5], [1, 2, 3]], np.int32)
READ = {
    "inputs": {"source": IDS, "unread": IDS + 90},
    "targets": np.maximum(IDS, 0),
    "source_lengths": np.asarray([3, 0], np.int32),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inputs": {"source": IDS + 1, "unread": IDS}},
            r"embedding needs ids from -5 to 4, for a table of 5 rows; got 5 at \[0, 1\]",
        ),
        ({"source_lengths": np.asarray([2, 9], np.int32)}, r"from 0 to 3, the .*; got 9 at \[1\]"),
        ({"source_lengths": np.asarray([-1, 2], np.int32)}, r"lstm needs lengths .* got -1 at"),
    ],
)
def test_ids_and_lengths_that_a_model_reads_are_checked_before_anything_compiles(
    nothing_compiles, change, message
):
    objective = bh.objective(reader(), LOSS)
    params = objective.init(jax.random.key(0), READ)
    optimizer = optax.sgd(0.1)
    state, step = bh.train_state(params, optimizer), bh.train_step(objective, optimizer)
    wrong, evaluate = READ | change, bh.value_and_grad(objective)
    for run in (
        lambda: bh.objective(reader(), LOSS).init(jax.random.key(0), wrong),
        lambda: evaluate(params, wrong),
        lambda: jax.grad(objective)(params, wrong),
        lambda: jax.jit(lambda params: evaluate(params, wrong))(params),
        lambda: step(state, wrong),
    ):
        with nothing_compiles(), pytest.raises(ValueError, match=message):
            run()
    assert np.isfinite(evaluate(params, READ)[0])
    with nothing_compiles(), pytest.raises(ValueError, match=message):  # shapes known by now
        evaluate(params, wrong)


def test_branches_that_read_the_same_ids_have_bounds_of_their_own(nothing_compiles):
    branches = bh.parallel(bh.embedding(9, 3), bh.chain(bh.embedding(7, 3), bh.tanh()))
    model = bh.chain(bh.add(*branches.parts.values()), bh.dense(3))
    batch = {"inputs": np.asarray([6, 7]), "targets": np.asarray([0, 1])}
    with nothing_compiles(), pytest.raises(ValueError, match="table of 7 rows; got 7 at"):
        bh.objective(model, LOSS).init(jax.random.key(0), batch)


def test_a_step_does_not_wait_for_ids_on_the_device(monkeypatch):
    objective, optimizer = bh.objective(reader(), LOSS), optax.sgd(0.1)
    batch = jax.tree.map(jnp.asarray, READ)
    state = bh.train_state(objective.init(jax.random.key(0), batch), optimizer)
    step = bh.train_step(objective, optimizer)
    monkeypatch.setattr("backhand.bounds.Bounds.check", lambda *args: pytest.fail("looked"))
    step(state, batch)
