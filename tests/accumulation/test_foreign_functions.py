"""What other libraries differentiate is accumulated as exactly: plain JAX, Flax and Equinox."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from tests.support import assert_close, labels, normal


def masked():
    return {
        "inputs": normal(0, 8, 5),
        "targets": labels(1, 3, 8),
        "weights": jnp.asarray([1.0, 1, 1, 0, 0, 0, 2, 0], float),
    }


def weighted(logits, batch):
    """The sum of the cross-entropies, and of their weights."""
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][:, None], 1)[:, 0]
    return -jnp.sum(batch["weights"] * picked), jnp.sum(batch["weights"])


def plain():
    """(params, params and batch -> logits)."""
    params = {"hidden": normal(2, 5, 4), "out": normal(3, 4, 3)}
    return (
        params,
        lambda params, batch: jnp.tanh(batch["inputs"] @ params["hidden"]) @ params["out"],
    )


def flax():
    """A Flax NNX model split into its state and what is left."""
    nnx = pytest.importorskip("flax.nnx")
    dtype = {"dtype": float, "param_dtype": float}

    class Classifier(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(5, 4, rngs=rngs, **dtype)
            self.out = nnx.Linear(4, 3, rngs=rngs, **dtype)

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    rest, params = nnx.split(Classifier(nnx.Rngs(0)), nnx.Param)
    return params, lambda params, batch: nnx.merge(rest, params)(batch["inputs"])


def equinox():
    """An Equinox model partitioned into its arrays and what is left."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(5, 3, 4, 1, activation=jnp.tanh, dtype=float, key=jax.random.key(0))
    params, rest = eqx.partition(model, eqx.is_array)
    return params, lambda params, batch: jax.vmap(eqx.combine(params, rest))(batch["inputs"])


@pytest.fixture(params=[plain, flax, equinox], ids=lambda make: make.__name__)
def foreign(request, x64):
    return request.param()


def test_sums_and_weights_of_another_library_accumulate_exactly(foreign):
    (params, predict), micro_batches = foreign, 4

    def loss(params, batch):
        return weighted(predict(params, batch), batch)

    data = masked()
    truth = jax.value_and_grad(lambda p: jnp.divide(*loss(p, data)))(params)
    sums = jax.value_and_grad(loss, has_aux=True)
    assert_close(jax.jit(bh.accumulate(sums, micro_batches))(params, data), truth)
    window = bh.accumulator(sums, micro_batches)
    state = window.init(params, data)
    for k in range(micro_batches):
        part = jax.tree.map(lambda leaf, k=k: leaf[k::micro_batches], data)
        state = window.add(state, params, part)
    assert_close(window.take(state)[0], truth)


def test_means_whose_weights_are_stated_accumulate_exactly(foreign):
    params, predict = foreign

    def mean(params, batch):
        total, weight = weighted(predict(params, batch), batch)
        return total / jnp.maximum(weight, 1)

    def weight(batch):
        return jnp.sum(batch["weights"])

    data = masked()
    function = jax.value_and_grad(mean)
    truth = function(params, data)
    assert_close(jax.jit(bh.accumulate(function, 4, weight=weight))(params, data), truth)
    parts = [jax.tree.map(lambda leaf, k=k: leaf[k::4], data) for k in range(4)]
    naive = jax.tree.map(lambda *g: sum(g) / 4, *[function(params, part)[1] for part in parts])
    with pytest.raises(AssertionError, match="differs by"):
        assert_close(naive, truth[1], 1e-2)


def test_an_equinox_gradient_function_is_accumulated_as_it_is(x64):
    eqx = pytest.importorskip("equinox")
    params, predict = equinox()

    @eqx.filter_value_and_grad(has_aux=True)
    def sums(params, batch):
        return weighted(predict(params, batch), batch)

    data = masked()
    truth = jax.value_and_grad(lambda p: jnp.divide(*weighted(predict(p, data), data)))(params)
    assert_close(jax.jit(bh.accumulate(sums, 4))(params, data), truth)


def streamed(function, params, data, micro_batches=4):
    window = bh.accumulator(function, micro_batches)
    sums = window.init(params, data)
    for k in range(micro_batches):
        part = jax.tree.map(lambda leaf, k=k: leaf[k::micro_batches], data)
        sums = window.add(sums, params, part)
    return window.take(sums)[0]


def test_whole_models_of_flax_are_accumulated_as_they_are(x64):
    """A model that holds its state may only be changed in the trace that it was made in."""
    nnx = pytest.importorskip("flax.nnx")

    class Classifier(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(5, 3, rngs=rngs, dtype=float, param_dtype=float)

        def __call__(self, x):
            return self.linear(x)

    def loss(model, batch):
        return weighted(model(batch["inputs"]), batch)

    model, data = Classifier(nnx.Rngs(0)), masked()
    truth = nnx.value_and_grad(lambda m: jnp.divide(*loss(m, data)))(model)
    sums = nnx.value_and_grad(loss, has_aux=True)
    for value, grads in (
        bh.accumulate(sums, 3)(model, data),
        nnx.jit(bh.accumulate(sums, 3))(model, data),
        streamed(sums, model, data),
    ):
        assert_close((value, jax.tree.leaves(grads)), (truth[0], jax.tree.leaves(truth[1])))


def test_a_flax_model_that_changes_itself_is_refused(nothing_compiles):
    """Its dropout would give every micro-batch one mask, its statistics would stay as they were."""
    nnx = pytest.importorskip("flax.nnx")

    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(5, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x)))

    def loss(model, batch):
        return jnp.mean(model(batch) ** 2)

    model, x = Noisy(nnx.Rngs(0)), np.ones((4, 5), np.float32)
    for function in (nnx.value_and_grad(loss), nnx.jit(nnx.value_and_grad(loss))):
        run = bh.accumulate(function, 2, weight=len)
        window = bh.accumulator(function, 2, weight=len)
        with nothing_compiles():
            for use in (functools.partial(jax.eval_shape, run), window.init):
                with pytest.raises(TypeError, match=r"changes 'dropout/rngs/count.*model\.eval"):
                    use(model, x)
        model.eval()
        assert jax.eval_shape(run, model, x)[0].shape == ()
        model.train()
    model.eval()
    checkpointed = bh.accumulate(nnx.remat(nnx.value_and_grad(loss)), 2, weight=len)
    assert jax.eval_shape(checkpointed, model, x)[0].shape == ()


def test_the_noise_of_a_split_flax_model_comes_from_the_key():
    nnx = pytest.importorskip("flax.nnx")
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    rest, state = nnx.split(dropout)

    def loss(params, batch, *, key):
        model = nnx.merge(rest, state)
        return jnp.sum(params * model(batch[0], rngs=nnx.Rngs(dropout=key))), jnp.asarray(2.0)

    run = bh.accumulate(jax.value_and_grad(loss, has_aux=True), 8)
    _, grads = jax.jit(run)(jnp.ones(16), jnp.ones((8, 16)), key=jax.random.key(0))
    assert len(np.unique(grads)) > 2  # shares of micro-batches; with one mask 0 and 1


def test_whole_models_of_equinox_are_accumulated_as_they_are(x64):
    """Among their leaves are functions."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(5, 3, 4, 1, activation=jnp.tanh, dtype=float, key=jax.random.key(0))

    def loss(model, batch):
        return weighted(jax.vmap(model)(batch["inputs"]), batch)

    data = masked()
    truth = eqx.filter_value_and_grad(lambda m: jnp.divide(*loss(m, data)))(model)
    sums = eqx.filter_value_and_grad(loss, has_aux=True)
    assert_close(eqx.filter_jit(bh.accumulate(sums, 3))(model, data), truth)
    assert_close(streamed(sums, model, data), truth)


def test_a_batch_may_be_any_tree(x64):
    params, predict = plain()

    def loss(params, batch):
        inputs, rest = batch
        return weighted(predict(params, {"inputs": inputs}), rest)

    data = masked()
    batch = data.pop("inputs"), data
    sums = jax.value_and_grad(loss, has_aux=True)
    assert_close(streamed(sums, params, batch), bh.accumulate(sums, 4)(params, batch))


def test_dropout_of_another_library_has_a_key_for_each_micro_batch(x64):
    eqx = pytest.importorskip("equinox")
    noise = eqx.nn.Dropout(0.5)

    def loss(params, batch, *, key):
        return jnp.sum(noise(params, key=key)), jnp.asarray(1.0)

    data = {"inputs": jnp.zeros((8, 1))}
    run = bh.accumulate(jax.value_and_grad(loss, has_aux=True), 8)
    _, grads = jax.jit(run)(jnp.ones(16), data, key=jax.random.key(0))
    kept = grads / 2  # the share of the micro-batches in which each was kept, not 0 or 1
    assert ((kept > 0) & (kept < 1)).sum() > 8


def test_other_arguments_are_passed_on(x64):
    def loss(params, batch, *, power):
        return jnp.sum(jnp.abs(batch["inputs"] * params) ** power), jnp.asarray(4.0)

    data = {"inputs": normal(0, 8, 1)}
    sums = jax.value_and_grad(loss, has_aux=True)
    value, _ = bh.accumulate(sums, 2)(jnp.ones(()), data, power=3)
    assert_close(value, jnp.sum(jnp.abs(data["inputs"]) ** 3) / 8)


@pytest.mark.parametrize("nonfinite", ["keep", "drop"])
def test_a_micro_batch_that_is_not_finite_is_dropped_by_choice(foreign, nonfinite):
    params, predict = foreign

    def loss(params, batch):
        return weighted(predict(params, batch), batch)

    data = masked()
    sick = {**data, "inputs": data["inputs"].at[1].set(jnp.inf)}
    sums = jax.value_and_grad(loss, has_aux=True)
    result = jax.jit(bh.accumulate(sums, 4, nonfinite=nonfinite))(params, sick)
    if nonfinite == "keep":
        assert not jnp.isfinite(result[0])
        return
    healthy = {**data, "weights": jnp.where(jnp.arange(8) % 4 == 1, 0, data["weights"])}
    assert_close(result, jax.value_and_grad(lambda p: jnp.divide(*loss(p, healthy)))(params))


def test_trees_that_do_not_fit_are_refused(x64):
    params, predict = plain()
    sums = jax.value_and_grad(lambda p, b: weighted(predict(p, b), b), has_aux=True)
    data = masked()
    with pytest.raises(ValueError, match=r"one common first axis, got lengths \[6, 8\]"):
        bh.accumulate(sums, 2)(params, {**data, "targets": data["targets"][:6]})
    with pytest.raises(ValueError, match=r"one common first axis, got lengths \['none', 8\]"):
        bh.accumulate(sums, 2)(params, {**data, "temperature": jnp.ones(())})


def test_a_mean_in_float16_times_its_weight_does_not_overflow():
    """In a micro-batch of 2,048 examples, of which the mean is 40."""
    data, params = jnp.full((4096, 1), 40, jnp.float16), jnp.ones(1, jnp.float16)

    def mean(p, x):
        return jnp.mean(x.astype(jnp.float32) @ p.astype(jnp.float32))

    accumulated = bh.accumulate(jax.value_and_grad(mean), 2, weight=len)
    value, gradient = accumulated(params, data)
    assert (float(value), float(gradient[0]), gradient.dtype) == (40, 40, jnp.float16)


def test_one_number_is_what_a_micro_batch_has_of_each(x64):
    params, predict = plain()
    data = masked()

    def mean(p, b):
        return jnp.mean(predict(p, b))

    def each(p, b):
        return weighted(predict(p, b), b)[0], b["weights"]

    weights = bh.accumulate(jax.value_and_grad(each, has_aux=True), 2)
    with pytest.raises(ValueError, match=r"the weight of a micro-batch is one number, got shape"):
        weights(params, data)
    stated = bh.accumulate(jax.value_and_grad(mean), 2, weight=lambda b: b["weights"])
    with pytest.raises(ValueError, match=r"the weight of .* got shape \(4,\): sum over its exam"):
        stated(params, data)

    def ragged(p, b):
        return (jnp.sum(b["inputs"]), jnp.sum(b["weights"])), b["inputs"]

    with pytest.raises(ValueError, match="what adds up over micro-batches has one shape"):
        bh.accumulate(ragged, 3)(params, data)


def test_what_a_function_gives_and_is_given_is_named(unchecked):
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    batch = jnp.ones((4, 1))

    def refused(error, message, value, grads, *more, weight=None, **given):
        run = bh.accumulate(lambda params, batch: (value, grads), 2, weight=weight)
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda: run(params, batch, *more, **given))

    pair = jnp.ones(()), jnp.ones(())
    refused(TypeError, "floating-point arrays, got 1 for a", pair, {"a": 1})
    refused(ValueError, r"a: \(3,\), got \(\)", pair, {"a": jnp.ones(()), "b": jnp.ones(2)})
    refused(TypeError, r"\(mean, gradient\), .* not a tuple of 2", pair, params, weight=len)
    refused(TypeError, "the weight of a micro-batch is .* got a dict", (pair[0], {}), params)
    refused(TypeError, "got 2 arguments for it: give", pair, params, batch)
    noisy = bh.accumulate(jax.value_and_grad(lambda p, x, *, key: (0.0, 1.0), has_aux=True), 2)
    with pytest.raises(TypeError, match=r"needs a key: give key=jax\.random\.key"):
        jax.eval_shape(noisy, params, batch)


def test_a_leaf_that_is_taken_out_is_a_change(nothing_compiles):
    def taking(params, batch):
        params.pop("b")
        return jnp.sum(params["a"]), params

    run = bh.accumulate(taking, 2, weight=len)
    with nothing_compiles(), pytest.raises(TypeError, match="changes 'b' of its model"):
        jax.eval_shape(run, {"a": np.ones(3), "b": np.ones(2)}, np.ones((4, 1)))


@jax.tree_util.register_pytree_node_class
class Anew:
    """A tree whose leaves are made whenever it is flattened."""

    def __init__(self, w):
        self.w = w

    def tree_flatten(self):
        return (self.w * 1,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def test_leaves_that_are_made_anew_are_no_change():
    def scaled(params, batch):
        return jnp.sum(params.w), {"w": params.w}

    run = bh.accumulate(scaled, 2, weight=len)
    assert float(run(Anew(jnp.ones(3)), jnp.ones((4, 1)))[0]) == 3


def test_the_numpy_arrays_of_a_model_are_not_written_to():
    def writing(params, batch):
        params["w"][...] = 7
        return jnp.sum(params["w"]), params

    model = {"w": np.ones(3)}
    with pytest.raises(TypeError, match="immutable"):
        bh.accumulate(writing, 2, weight=len)(model, jnp.ones((4, 1)))
    assert model["w"].tolist() == [1, 1, 1]
