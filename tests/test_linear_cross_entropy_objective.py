"""The objective of a language model: the chain that it stands for, tied or not, in any split."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import backhand as bh
from tests.support import (
    assert_close,
    assert_gradient_and_norms,
    assert_gradients_agree,
    labels,
    normal,
    spread,
)

V, D = 11, 6


def trunk():
    return bh.chain(tokens=bh.embedding(V, D), hidden=bh.dense(D), act=bh.tanh())


def ids(weights=True):
    batch = {"inputs": labels(0, V, 4, 5), "targets": labels(1, V, 4, 5)}
    return {**batch, "weights": normal(2, 4, 5) ** 2} if weights else batch


def start(objective, batch):
    return spread(objective.init(jax.random.key(0), batch))


def fused(tied, **settings):
    path = "tokens/table" if tied else None
    return bh.linear_cross_entropy_objective(trunk(), V, tied=path, **settings)


def textbook(tied):
    """The chain that it stands for, its parameters under the same names."""
    output = bh.unembedding(V) if tied else bh.dense(V, bias=False)
    model = bh.chain(trunk=trunk(), output=output)
    if tied:
        model = bh.share(model, {"output/table": "trunk/tokens/table"})
    return bh.objective(model, bh.losses.softmax_cross_entropy)


@pytest.mark.parametrize("rows", [None, 6])
@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_chain_with_an_output_layer(x64, tied, rows):
    ours, theirs = fused(tied, rows=rows), textbook(tied)
    params = start(ours, ids())
    same = {**params, "output": {}} if tied else params
    value, grads = bh.value_and_grad(ours)(params, ids())
    expected, truth = jax.value_and_grad(theirs)(same, ids())
    assert_close(value, expected)
    assert_close(grads["trunk"], truth["trunk"])
    assert ("output" in grads) is not tied
    if not tied:
        assert_close(grads["output"], truth["output"])
    assert_gradients_agree(ours, params, ids())


@pytest.mark.parametrize("tied", [False, True])
def test_compare_and_micro_batches_agree(x64, tied):
    loss = fused(tied, rows=6, soft_cap=5.0, z_loss=0.01, label_smoothing=0.1)
    batch = ids()
    params = start(loss, batch)
    assert bh.compare(loss, params, batch).agrees
    whole = bh.value_and_grad(loss)(params, batch)
    for split in (2, 3, 4):
        assert_close(bh.accumulate(bh.value_and_grad(loss), split)(params, batch), whole, 1e-11)


@pytest.mark.parametrize("tied", [False, True])
def test_few_logits_have_norms_of_examples_and_many_say_that_they_have_none(x64, tied):
    batch = ids()
    params = start(fused(tied), batch)
    assert_gradient_and_norms(fused(tied), params, batch)
    many = bh.value_and_collect(fused(tied, rows=6), norms=bh.square_norms)
    with pytest.raises((TypeError, ValueError), match="per-example"):
        many(params, batch)


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_trains_it(tied):
    loss, batch = fused(tied, rows=8), ids(weights=False)
    params = loss.init(jax.random.key(0), batch)
    optimizer = optax.adam(3e-2)
    state, step = bh.train_state(params, optimizer), bh.train_step(loss, optimizer, accumulate=2)
    found = []
    for _ in range(30):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    assert found[0] == pytest.approx(np.log(V), rel=0.2) and found[-1] < 0.7 * found[0]


def test_parameters_are_the_trunks_and_the_outputs():
    params = jax.eval_shape(fused(False).init, jax.random.key(0), ids())
    assert params["output"]["w"].shape == (D, V)
    assert list(jax.eval_shape(fused(True).init, jax.random.key(0), ids())) == ["trunk"]
    wide = bh.linear_cross_entropy_objective(
        trunk(), V, initializer=lambda key, shape, dtype: jnp.full(shape, 7, dtype)
    )
    assert (wide.init(jax.random.key(0), ids())["output"]["w"] == 7).all()


def test_what_cannot_be_is_refused(unchecked):
    make = bh.linear_cross_entropy_objective
    with pytest.raises(TypeError, match="needs a layer as its trunk"):
        make(bh.dense, V)
    with pytest.raises(ValueError, match="needs vocabulary >= 1, got 0"):
        make(trunk(), 0)
    with pytest.raises(ValueError, match="has an initializer already"):
        make(trunk(), V, tied="tokens/table", initializer=jax.nn.initializers.normal())
    with pytest.raises(ValueError, match="no parameter at 'trunk/words/table'"):
        make(trunk(), V, tied="words/table").init(jax.random.key(0), ids())
    with pytest.raises(ValueError, match=r"must have the shape .*float32\[11, 6\]"):
        make(trunk(), V + 1, tied="tokens/table").init(jax.random.key(0), ids())
    loss = make(trunk(), V)
    params = loss.init(jax.random.key(0), ids())
    wrong = {name: np.array(leaf) for name, leaf in ids().items()}
    wrong["targets"][1, 2] = V
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 11\).* got 11 at \[1, 2\]"):
        bh.value_and_grad(loss)(params, wrong)
    with pytest.raises(ValueError, match="a batch needs 'targets'"):
        loss(params, {"inputs": ids()["inputs"]})
