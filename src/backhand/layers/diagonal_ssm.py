"""A state-space layer with real decays, one for each part of its state."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import lecun_normal
from jaxtyping import Float

from backhand import ops
from backhand.arrays import (
    accumulation_dtype,
    last_axis,
    like_primal,
    product,
    upcast,
    varying,
    whole,
    whole_number,
    zeros_like,
)
from backhand.contributions import Outer, Total
from backhand.ops.linear import linear_dx
from backhand.ops.linear_recurrence import Residuals
from backhand.ops.recurrent import check_sequence
from backhand.protocol import Layer, layer
from backhand.visit import Params, PyTree


def diagonal_ssm(states: int, *, reverse: bool = False) -> Layer:
    """A linear recurrence between two linear maps, from (B, T, D) to (B, T, D).

        u_t = x_t w_in        h_t = a h_{t-1} + sqrt(1 - a^2) u_t        y_t = h_t w_out + x_t skip

    with a = sigmoid(decay) in (0, 1). The root keeps the variance of h at that of u, whatever a is.
    What is between the steps is linear, so put the layer in a `skip` with something that is not.
    With e_t the error of sqrt(1 - a^2) u_t and da_t that of the factor at step t, as
    `backhand.ops.linear_recurrence` gives them:

        dw_out = sum_t h_t dy_t        dskip = sum_t x_t dy_t        dw_in = sum_t x_t du_t
        du = sqrt(1 - a^2) e           dx = du w_in^T + dy skip
        ddecay = a (1 - a) sum_t (da_t - a u_t e_t / sqrt(1 - a^2))

    Parameters: w_in (D, N), decay (N,), beginning with a spread evenly over 0.9 to 0.999, w_out
    (N, D) and skip (D,), beginning at zero.

    Args:
        states: N.
        reverse: from the last step to the first.

    Raises:
        ValueError: if states < 1; when run, for x that is not of rank 3.
        TypeError: if x is not floating point.

    Example:
        >>> layer = diagonal_ssm(16)
        >>> x = jnp.ones((2, 5, 3))
        >>> layer(layer.init(jax.random.key(0), x), x).shape
        (2, 5, 3)

    References:
        Gupta, Gu and Berant, "Diagonal state spaces are as effective as structured state spaces",
        2022; Orvieto et al., "Resurrecting recurrent neural networks for long sequences", 2023.
    """
    if whole_number("states", states) < 1:
        raise ValueError(f"diagonal_ssm needs at least 1 state, got {states}")

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        check_sequence("diagonal_ssm", x)
        dtype, keys, features = accumulation_dtype(x.dtype), jax.random.split(key), x.shape[-1]
        a = jnp.linspace(0.9, 0.999, states, dtype=dtype)
        return {
            "w_in": lecun_normal()(keys[0], (features, states), dtype),
            "decay": jnp.log(a) - jnp.log1p(-a),
            "w_out": lecun_normal()(keys[1], (states, features), dtype),
            "skip": jnp.zeros(features, dtype),
        }

    def factors(params: Params, u: Array) -> tuple[Array, Array, Array]:
        """The factor a, sqrt(1 - a) and sqrt(1 + a), to meet u.

        The rounding of a grows over 1 / (1 - a) steps. In longer sequences what is made of the
        rounded a goes with it, and is off by less; in shorter ones 1 - a has all its digits.
        """
        decay = whole(params["decay"]).astype(accumulation_dtype(u.dtype))
        a, root = jax.nn.sigmoid(decay), jnp.exp(jax.nn.log_sigmoid(-decay) / 2)
        long = u.shape[1] * root * root > 1
        root = jnp.where(long, jnp.sqrt(jnp.where(long, 1 - a, 1)), root)
        return last_axis(a, u), last_axis(root, u), last_axis(jnp.sqrt(1 + a), u)

    def spread(a: Array, u: Array) -> Array:
        """The factors of every step, split over devices as u is."""
        return varying(zeros_like(u, a.dtype), u) + a

    def forward(params: Params, x: Float[Array, "B T D"]) -> tuple[Array, PyTree]:
        check_sequence("diagonal_ssm", x)
        u = product(x, whole(params["w_in"]))
        a, minus, plus = factors(params, u)
        full, v = spread(a, u), (minus * plus * upcast(u)).astype(u.dtype)
        h, _ = ops.linear_recurrence.forward(full, v, reverse=reverse)
        y = product(h, params["w_out"]) + x * last_axis(params["skip"].astype(x.dtype), x)
        return y, (x, u, h)

    def rule(params: Params, residuals: PyTree, dy: Array) -> tuple[PyTree, Array]:
        x, u, h = residuals
        a, minus, plus = factors(params, u)
        full, dh = spread(a, u), linear_dx(dy, params["w_out"], h)
        own = Residuals(full, u, None, h)
        da, e, _ = ops.linear_recurrence.backward(own, dh, reverse=reverse)
        ddecay = a * minus * (minus * da - a / plus * upcast(u) * upcast(e))
        du = (minus * plus * upcast(e)).astype(x.dtype)
        dparams = {
            "w_in": Outer(x, du),
            "decay": Total(ddecay),
            "w_out": Outer(h, dy),
            "skip": Total(x * dy),
        }
        straight = dy * last_axis(params["skip"].astype(dy.dtype), dy)
        return dparams, linear_dx(du, params["w_in"], x) + like_primal(straight, x)

    return layer("diagonal_ssm", init, forward, rule)
