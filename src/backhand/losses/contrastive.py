"""The contrastive loss: each query is to find its own key among those of the batch.

With the directions u of queries and v of keys, see `similarity`, and the similarities z:

    z_ij = u_i v_j / tau
    l_i  = log sum_j exp(z_ij) - z_ii
    dz_ij = P_ij - [i = j]      du_i = sum_j dz_ij v_j / tau      dv_j = sum_i dz_ij u_i / tau

P is the softmax of the rows of z. Where keys are to find their queries too, the loss is the mean of
that of z and that of its transpose, and P the mean of both softmaxes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from backhand.arrays import (
    by_batch,
    contract,
    explicit_sharding,
    flag,
    like_primal,
    number,
    product,
    upcast,
)
from backhand.losses.common import (
    Sum,
    check_weights,
    masked,
    spread,
    weighted_sum,
    weighted_sum_backward,
)
from backhand.losses.similarity import EPS, length_of, textbook_unit
from backhand.protocol import Loss, need_floating


class Contrast(NamedTuple):
    """Directions and lengths of both, and of rows, or rows and columns, `_among(z)`."""

    queries: Float[Array, "B D"]
    keys: Float[Array, "B D"]
    weights: Array | None
    losses: Float[Array, " B"]
    among: tuple[tuple[Float[Array, "B B"], Array], ...]
    u: tuple[Array, Array]
    v: tuple[Array, Array]


def info_nce_forward(
    queries: Float[Array, "B D"],
    keys: Float[Array, "B D"],
    weights: Array | None = None,
    *,
    temperature: float = 0.07,
    symmetric: bool = False,
) -> tuple[Sum, Contrast]:
    """sum(w l) and sum(w), with l_i = -log softmax_j(cos(q_i, k_j) / tau) at j = i.

    Each query is to find its own key among those of the batch. Keys of examples of weight 0 are no
    negatives for others. The negatives are those of a micro-batch where a gradient is accumulated.
    Queries and keys of two encoders, or of two views by one, are predictions both: `paired`.

    Args:
        queries: (B, D), of any length from 1e-6 up: directions are compared.
        keys: of the same shape; key i belongs to query i.
        weights: per example, (B,).
        temperature: tau above 0.
        symmetric: whether it is the mean of this and of the loss of (keys, queries), as in CLIP:
            each key is to find its query, too.

    Raises:
        TypeError: if queries or keys are not floating point.
        ValueError: if the shapes do not fit, or the temperature is not above 0.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> total, weight = bh.losses.info_nce(jnp.eye(3), jnp.eye(3), temperature=1.0)
        >>> round(float(total / weight), 4)  # log(e + 2) - 1
        0.5514

    References:
        van den Oord et al., "Contrastive predictive coding", 2018.
        Radford et al., "CLIP", 2021.
    """
    flag("info_nce's symmetric", symmetric)
    if not number("info_nce's temperature", temperature) > 0:
        raise ValueError(f"info_nce needs a temperature above 0, got {temperature}")
    need_floating("info_nce", queries, "queries")
    need_floating("info_nce", keys, "keys")
    if queries.ndim != 2 or keys.shape != queries.shape:
        raise ValueError(
            f"info_nce needs queries and keys of one shape (B, D), got {queries.shape} and "
            f"{keys.shape}"
        )
    if weights is not None and weights.shape != queries.shape[:1]:
        raise ValueError(
            f"info_nce needs weights of shape {queries.shape[:1]}, one per example; got "
            f"{weights.shape}"
        )
    residuals = _contrast(queries, keys, weights, temperature, symmetric)
    return weighted_sum("info_nce", residuals.losses, weights), residuals


def info_nce_backward(
    residuals: Contrast, dy: Sum, *, temperature: float = 0.07, symmetric: bool = False
) -> tuple[Array, Array, Array | None]:
    queries, keys, weights, losses, among, u, v = residuals
    dlosses, dweights = weighted_sum_backward(losses, weights, dy)
    each = dlosses / temperature / len(among)
    own = _own(among[0][0]).astype(each.dtype)
    dz = masked(each[:, None], among[0][0] * among[0][1] - own)
    if symmetric:
        dz += masked(_everywhere(each)[None, :], among[1][0] * among[1][1] - own)
    du = contract(dz, v[0], ((1,), (0,)), u[0])
    dv = contract(dz, u[0], ((0,), (0,)), v[0])
    dq, dk = _unit_backward(u, du), _unit_backward(v, dv)
    return like_primal(dq, queries), like_primal(dk, keys), dweights


def _contrast(
    queries: Array, keys: Array, weights: Array | None, temperature: float, symmetric: bool
) -> Contrast:
    x = upcast(queries)
    k = keys.astype(x.dtype)
    absent = None if weights is None else spread("info_nce", weights, x[:, 0]) == 0
    if absent is not None:
        x, k = (jnp.where(absent[:, None] & ~jnp.isfinite(y), 0, y) for y in (x, k))
    u, v = _unit(x), _unit(k)
    z = product(u[0], _everywhere(v[0]).T) / temperature
    if absent is not None:
        left_out = _everywhere(absent)[None, :]
        left_out = left_out | absent[:, None] if symmetric else left_out
        z = jnp.where(~_own(z) & left_out, -jnp.inf, z)
    log_sum, *rows = _among(z, 1)
    among = [rows]
    if symmetric:
        other, *columns = _among(z, 0)
        log_sum = (log_sum + by_batch(other)) / 2
        among.append(columns)
    losses = log_sum - jnp.sum(u[0] * v[0], 1) / temperature
    return Contrast(queries, keys, weights, losses, tuple((e, one) for e, one in among), u, v)


def _among(z: Array, axis: int) -> tuple[Array, Array, Array]:
    """log sum exp(z) along an axis, exp(z) over its largest there, and one over the sum of it."""
    top = lax.stop_gradient(jnp.max(z, axis, keepdims=True, initial=-jnp.inf))
    e = jnp.exp(z - top)
    summed = jnp.sum(e, axis, keepdims=True)
    return jnp.squeeze(top + jnp.log(summed), axis), e, 1 / summed


def _own(z: Array) -> Array:
    """Where a query meets its own key."""
    return lax.broadcasted_iota(jnp.int32, z.shape, 0) == lax.broadcasted_iota(
        jnp.int32, z.shape, 1
    )


def info_nce_reference(
    queries: Array,
    keys: Array,
    weights: Array | None = None,
    *,
    temperature: float = 0.07,
    symmetric: bool = False,
) -> Sum:
    queries = upcast(queries)
    u, v = textbook_unit(queries), textbook_unit(keys.astype(queries.dtype))
    z = u @ v.T / temperature
    if weights is not None:
        there = (weights.astype(z.dtype) != 0)[None, :]
        there = there & there.T if symmetric else there
        z = jnp.where(there | jnp.eye(len(z), dtype=bool), z, -jnp.inf)
    losses = -jnp.diag(jax.nn.log_softmax(z))
    if symmetric:
        losses = (losses - jnp.diag(jax.nn.log_softmax(z.T))) / 2
    return weighted_sum("", losses, weights)


def _unit(x: Array) -> tuple[Array, Array]:
    """Directions and lengths."""
    length = length_of(x)
    return x / length, length


def _unit_backward(unit: tuple[Array, Array], du: Array) -> Array:
    """The error of the vectors; a length that is EPS does not change."""
    u, length = unit
    along = jnp.where(length > EPS, jnp.sum(u * du, -1, keepdims=True), 0)
    return (du - u * along) / length


def _everywhere(x: Array) -> Array:
    """`x` whole on every device of an explicit mesh."""
    sharding = explicit_sharding(x)
    if sharding is None:
        return x
    return jax.sharding.reshard(x, sharding.update(spec=(None,) * x.ndim))


info_nce = Loss("info_nce", info_nce_forward, info_nce_backward, info_nce_reference, check_weights)
