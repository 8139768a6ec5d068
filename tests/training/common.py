"""What tests of the step share: two objectives, batches, a state, one step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import backhand as bh
from tests.support import labels, normal, spread

MODEL = bh.chain(hidden=bh.dense(6), act=bh.tanh(), out=bh.dense(3))


OBJECTIVE = bh.objective(
    MODEL, bh.losses.softmax_cross_entropy, metrics={"accuracy": bh.metrics.accuracy}
)


NOISY = bh.objective(
    bh.chain(bh.dense(6), bh.batch_norm(), bh.relu(), bh.dropout(0.3), bh.dense(3)),
    bh.losses.softmax_cross_entropy,
)


def combined():
    cross_entropy = bh.losses.softmax_cross_entropy
    losses = {"plain": cross_entropy, "smooth": cross_entropy.bind(label_smoothing=0.1)}
    each = {name: bh.objective(MODEL, loss) for name, loss in losses.items()}
    return bh.combine(each, {"plain": 1.0, "smooth": 0.5})


FROZEN = ["hidden/*", "out/b"]


def batch(seed=0, rows=8):
    weights = np.random.default_rng(seed + 2).integers(0, 3, rows)
    return {
        "inputs": normal(seed, rows, 4),
        "targets": labels(seed + 1, 3, rows),
        "weights": jnp.asarray(weights, jnp.result_type(float)),
    }


def stacked(steps, start=0):
    parts = [batch(10 * seed) for seed in range(start, start + steps)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def begin(optimizer, objective=OBJECTIVE, **settings):
    params = spread(objective.init(jax.random.key(0), batch()))
    if objective is NOISY:
        params = objective.init(jax.random.key(0), batch())
    return bh.train_state(params, optimizer, **settings)


def one_step(optimizer=None, objective=OBJECTIVE, data=None, state=None, **settings):
    """(parameters before, state, metrics) of one step."""
    optimizer = optax.sgd(1.0) if optimizer is None else optimizer
    state = begin(optimizer, objective) if state is None else state
    before = jax.tree.map(jnp.copy, state.params)
    step = bh.train_step(objective, optimizer, **settings)
    return before, *step(state, batch() if data is None else data)


def updates(before, state):
    """What the step subtracted from the parameters: with plain descent at rate 1, the gradient."""
    return jax.tree.map(jnp.subtract, before, state.params)


def gradient(params, data=None):
    return jax.jit(jax.grad(OBJECTIVE))(params, batch() if data is None else data)
