"""Tables and time: what is looked up, what attends, what comes back each step."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from backhand.audit.exercises.task import Task
from backhand.catalogue import Spec
from backhand.visit import Residuals


def embedding_forward(
    table: Float[Array, "V D"], ids: Int[Array, " T"]
) -> tuple[Float[Array, "T D"], Residuals]:
    """y_t = the row of the table that ids[t] names."""
    return table[ids], (table, ids)


def embedding_backward(residuals: Residuals, dy: Float[Array, "T D"]) -> tuple[Array, None]:
    table, ids = residuals
    return jnp.zeros_like(table).at[ids].add(dy), None


def attention_forward(
    q: Float[Array, "T D"], k: Float[Array, "S D"], v: Float[Array, "S E"]
) -> tuple[Float[Array, "T E"], Residuals]:
    """y = p v, with p = softmax(q k^T / sqrt(D)) in each row: one head."""
    scores = q @ k.T / jnp.sqrt(q.shape[1])
    powers = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    p = powers / jnp.sum(powers, axis=1, keepdims=True)
    return p @ v, (q, k, v, p)


def attention_backward(residuals: Residuals, dy: Float[Array, "T E"]) -> tuple[Array, Array, Array]:
    q, k, v, p = residuals
    dp = dy @ v.T
    dscores = p * (dp - jnp.sum(p * dp, axis=1, keepdims=True)) / jnp.sqrt(q.shape[1])
    return dscores @ k, dscores.T @ q, p.T @ dy


def recurrent_forward(
    x: Float[Array, "T I"], w: Float[Array, "I H"], u: Float[Array, "H H"], h: Float[Array, " H"]
) -> tuple[Float[Array, "T H"], Residuals]:
    """h_t = tanh(x_t w + h_(t-1) u), and y = all h_t; the state begins as h."""
    states, before = [], h
    for x_t in x:
        before = jnp.tanh(x_t @ w + before @ u)
        states.append(before)
    y = jnp.stack(states)
    return y, (x, w, u, h, y)


def recurrent_backward(
    residuals: Residuals, dy: Float[Array, "T H"]
) -> tuple[Array, Array, Array, Array]:
    x, w, u, h, y = residuals
    dx, dw, du, dh = jnp.zeros_like(x), jnp.zeros_like(w), jnp.zeros_like(u), jnp.zeros_like(h)
    for t in reversed(range(len(x))):
        before = y[t - 1] if t else h
        da = (dy[t] + dh) * (1 - y[t] ** 2)
        dx = dx.at[t].set(da @ w.T)
        dw = dw + jnp.outer(x[t], da)
        du = du + jnp.outer(before, da)
        dh = da @ u.T
    return dx, dw, du, dh


TASKS = (
    Task(
        "embedding",
        3,
        embedding_forward,
        embedding_backward,
        {"table": Spec("normal", "5 3"), "ids": Spec("ids", "7", below="5")},
        "A row of the table goes to every place that names it. Some are named twice, some never. "
        "Ids are integers: return None for them.",
        (
            "Which rows of the table can move y at all?",
            "A row that is used twice collects the blame of both uses.",
            "Begin with zeros and add each dy to its row; x.at[ids] has a method that adds up "
            "repeated ids, and one that does not.",
        ),
    ),
    Task(
        "attention",
        5,
        attention_forward,
        attention_backward,
        {"q": Spec("normal", "3 4"), "k": Spec("normal", "5 4"), "v": Spec("normal", "5 2")},
        "Two products of matrices with a softmax between them. Go back through each in turn: y to "
        "p and v, p to the scores, the scores to q and k.",
        (
            "y = p v is a linear map twice: as a function of v, and as one of p.",
            "From dp to the blame of the scores is the softmax exercise, row by row.",
            "The scores were divided by a number on the way forward. q and k swap their places on "
            "the way back, one of them with a transpose.",
        ),
    ),
    Task(
        "recurrent",
        5,
        recurrent_forward,
        recurrent_backward,
        {
            "x": Spec("normal", "3 4"),
            "w": Spec("normal", "4 2"),
            "u": Spec("normal", "2 2"),
            "h": Spec("normal", "2"),
        },
        "The same weights work at every step, and each state feeds the next. Walk from the last "
        "step to the first, and carry the blame of the state along.",
        (
            "The state h_t gets blame from two sides: from y at t, and from step t + 1.",
            "The slope of tanh can be written with its own output, which is among the residuals.",
            "w and u are used at every step, so their blame adds up over time. What is left in "
            "your hands after the first step is the blame of the state that it all began with.",
        ),
    ),
)
