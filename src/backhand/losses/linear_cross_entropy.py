"""Output layer and softmax cross-entropy in one, whose logits never exist whole.

With vocabularies of tens of thousands the logits of a language model are its largest array by far.
Each row n of x gives logits z = x_n w, and from them

    u_v = z_v, or c tanh(z_v / c) with a soft cap c
    L   = log sum_v exp(u_v)                        p_v = exp(u_v - L)
    l_n = L - sum_v t_v u_v + k L^2                 t the smoothed label, k the z-loss

    du_v = p_v (1 + 2 k L) - t_v                    what was predicted less what was true
    dz_v = du_v (1 - (u_v / c)^2)
    dx_n = dz w^T                                   dw = sum_n x_n^T dz

No row needs the logits of another. So rows are taken a few hundred at a time, and since the error
of the total is one factor for all of them, a chunk's part of dx and dw is computed for an error of
1 while its logits are at hand: three products in all, as without chunks, none twice. Backward only
scales. Where nobody asks for the gradient, that part of the forward is dead code to the compiler:
evaluate under `jax.jit`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from backhand.arrays import (
    accumulation_dtype,
    explicit_sharding,
    like_primal,
    need_integers,
    number,
    product,
    upcast,
    varying,
    whole_number,
)
from backhand.contributions import Outer, total
from backhand.losses.classification import check_smoothing
from backhand.losses.common import Sum, masked, spread, weighted_sum, weighted_sum_backward
from backhand.ops.linear import linear_dx
from backhand.protocol import Op, need_floating

ROWS = 512
"""Rows at a time. 4096 x 256 x 32000 takes 0.89 of autodiff's time and 0.13 of its memory; of that,
256 rows take 1.09 and 0.7, and 128 rows 1.09 and 0.5: every chunk adds to the whole of dw."""

LOGITS = 1 << 22
"""Logits that may exist whole. Both ways 1024 x 256 x 8192 takes in two chunks 0.86 of the time
that it takes whole, 2048 x 128 x 256 1.14 of it."""


class Softmax(NamedTuple):
    """What logits leave behind: exp(u - max u), its sum, L, and u where it is capped."""

    e: Float[Array, "... V"]
    sum: Float[Array, "... 1"]
    log_sum: Float[Array, "... 1"]
    capped: Float[Array, "... V"] | None


class WholeResiduals(NamedTuple):
    """Of few logits: all of them. `losses` are those of the positions."""

    x: Float[Array, "... D"]
    w: Float[Array, "_ _"]
    targets: Integer[Array, "..."]
    weights: Array | None
    losses: Float[Array, "..."]
    softmax: Softmax


class ChunkedResiduals(NamedTuple):
    """Of many logits none: `dx` and `dw` are the gradient for an error of 1."""

    x: Float[Array, "... D"]
    w: Float[Array, "_ _"]
    targets: Integer[Array, "..."]
    weights: Array | None
    losses: Float[Array, "..."]
    dx: Float[Array, "N D"]
    dw: Float[Array, "_ _"]


Residuals = WholeResiduals | ChunkedResiduals


def linear_cross_entropy_forward(
    x: Float[Array, "... D"],
    w: Float[Array, "_ _"],
    targets: Integer[Array, "..."],
    weights: Array | None = None,
    *,
    tied: bool = False,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    rows: int | None = None,
) -> tuple[Sum, Residuals]:
    """sum(w l) and sum(w), with l the cross-entropy of softmax(x w) for each position.

    Args:
        x: (B, ..., D), what comes out of the model before its output layer.
        w: weights (D, V), or a table (V, D) if `tied`; cast to the dtype of x.
        targets: integer labels (B, ...) in [0, V). One outside gives NaN, so that it is noticed,
            unless its weight is 0.
        weights: per example or per position; see `weighted_sum`. A label that is to be ignored has
            weight 0.
        tied: whether w is the table of an embedding.
        soft_cap: c above 0, the bound of |logits|; None for none.
        z_loss: k, at least 0, how much L^2 counts; it keeps logits from drifting.
        label_smoothing: s in [0, 1]: t is (1 - s) at the label, plus s / V everywhere.
        rows: how many rows are taken at a time; None for 512, or all of them where their logits are
            few. On an explicit mesh, which has its own way to split rows, always all.

    Raises:
        TypeError: if x or w is not floating point, targets or rows are not integers, or another
            setting is no number.
        ValueError: if the shapes do not fit, or a setting is outside of what is stated above.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> x, w, labels = jnp.ones((2, 3, 8)), jnp.zeros((8, 100)), jnp.zeros((2, 3), int)
        >>> total, weight = bh.losses.linear_cross_entropy(x, w, labels)
        >>> round(float(total / weight), 4)  # log 100
        4.6052

    References:
        Press and Wolf, "Using the output embedding to improve language models", 2016 (tied).
        Chowdhery et al., "PaLM", 2022 (z-loss). Gemma team, "Gemma 2", 2024 (soft cap).
        Hsu et al., "Liger kernel", 2024 (the gradient in the forward).
    """
    _check(x, w, targets, tied, soft_cap, z_loss, rows)
    check_smoothing("linear_cross_entropy", label_smoothing)
    loss = (soft_cap, z_loss, label_smoothing)
    count = targets.size
    if rows is None:
        # A chunk costs its logits and a second dw; whole, the logits are there twice.
        lean = 2 * count > ROWS + x.shape[-1] and count >= 2 * ROWS
        rows = ROWS if lean and count * w.size > LOGITS * x.shape[-1] else count
    if count <= rows or explicit_sharding(x) is not None:
        losses, softmax = _losses(_logits(x, w, tied), targets, *loss)
        residuals: Residuals = WholeResiduals(x, w, targets, weights, losses, softmax)
    else:
        residuals = _chunked(x, w, targets, weights, tied, loss, rows)
    return weighted_sum("linear_cross_entropy", residuals.losses, weights), residuals


def linear_cross_entropy_backward(
    residuals: Residuals,
    dy: Sum,
    *,
    tied: bool = False,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    rows: int | None = None,
) -> tuple[Array, Array, None, Array | None]:
    x, w, _, weights, losses, *_ = residuals
    _, dweights = weighted_sum_backward(losses, weights, dy)
    if isinstance(residuals, ChunkedResiduals):
        dtotal = dy[0].astype(losses.dtype)
        dx = (dtotal * upcast(residuals.dx)).reshape(x.shape)
        return like_primal(dx, x), like_primal(dtotal * residuals.dw, w), None, dweights
    dlogits = logit_error(residuals, dy, soft_cap, z_loss, label_smoothing)
    dw = Outer(dlogits, known(residuals)) if tied else Outer(known(residuals), dlogits)
    dx = linear_dx(dlogits, w.T if tied else w, x)
    return dx, total(dw, w), None, dweights


def logit_error(
    residuals: WholeResiduals,
    dy: Sum,
    soft_cap: float | None,
    z_loss: float,
    label_smoothing: float,
) -> Float[Array, "... V"]:
    """The error of the logits, in the dtype of x."""
    x, _, targets, weights, losses, softmax = residuals
    dlosses, _ = weighted_sum_backward(losses, weights, dy)
    return _error(softmax, targets, dlosses, soft_cap, z_loss, label_smoothing).astype(x.dtype)


def known(residuals: WholeResiduals) -> Float[Array, "... D"]:
    """x, with 0 for what is not finite in positions of weight 0."""
    return _known(residuals.x, spread("", residuals.weights, residuals.losses))


def _chunked(
    x: Array,
    w: Array,
    targets: Array,
    weights: Array | None,
    tied: bool,
    loss: tuple[float | None, float, float],
    rows: int,
) -> ChunkedResiduals:
    """The losses, dx and dw, chunk after chunk; the last is filled up with rows of weight 0."""
    positions, dtype = targets.shape, accumulation_dtype(x.dtype)
    each = spread("linear_cross_entropy", weights, jnp.zeros(positions, dtype))
    chunks = -(-targets.size // rows)
    size = -(-targets.size // chunks)

    def split(leaf: Array) -> Array:
        flat = leaf.reshape(targets.size, *leaf.shape[targets.ndim :])
        missing = chunks * size - targets.size
        if missing:
            filling = jnp.zeros((missing, *flat.shape[1:]), flat.dtype)
            flat = jnp.concatenate([flat, filling])
        return flat.reshape(chunks, size, *flat.shape[1:])

    def step(dw: Array, chunk: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        x, targets, each = chunk
        losses, softmax = _losses(_logits(x, w_cast, tied), targets, *loss)
        error = _error(softmax, targets, each, *loss).astype(x.dtype)
        dx = _dot(error, w_cast, 1, 0 if tied else 1).astype(x.dtype)
        x = _known(x, each)
        more = _dot(error, x, 0, 0) if tied else _dot(x, error, 0, 0)
        return dw + more, (losses, dx)

    w_cast = w.astype(x.dtype)
    of_chunks = (split(x), split(targets), split(each))
    dw, of_rows = lax.scan(step, varying(jnp.zeros_like(w, dtype), w, of_chunks), of_chunks)
    losses, dx = (leaf.reshape(chunks * size, *leaf.shape[2:])[: targets.size] for leaf in of_rows)
    return ChunkedResiduals(x, w, targets, weights, losses.reshape(positions), dx, dw)


def _logits(x: Array, w: Array, tied: bool) -> Array:
    """X w in at least float32."""
    if explicit_sharding(x) is not None:
        return upcast(product(x, w.T if tied else w))
    return _dot(x, w.astype(x.dtype), x.ndim - 1, 1 if tied else 0)


def _dot(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
    axes = (((axis_of_a,), (axis_of_b,)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=accumulation_dtype(a.dtype))


def _losses(
    logits: Array, targets: Array, soft_cap: float | None, z_loss: float, label_smoothing: float
) -> tuple[Array, Softmax]:
    """The loss of each position; NaN for a label that does not exist."""
    u = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    top = lax.stop_gradient(jnp.max(u, -1, keepdims=True))
    e = jnp.exp(u - top)
    summed = jnp.sum(e, -1, keepdims=True)
    log_sum = top + jnp.log(summed)
    true = (1 - label_smoothing) * _at_label(u, targets)
    if label_smoothing:
        true = true + label_smoothing * jnp.mean(u, -1)
    losses = log_sum[..., 0] - true
    if z_loss:
        losses = losses + z_loss * jnp.square(log_sum[..., 0])
    losses = jnp.where(_exists(targets, u), losses, jnp.nan)
    return losses, Softmax(e, summed, log_sum, None if soft_cap is None else u)


def _error(
    softmax: Softmax,
    targets: Array,
    dlosses: Array,
    soft_cap: float | None,
    z_loss: float,
    label_smoothing: float,
) -> Array:
    """The error of the logits, from that of each position's loss."""
    e, summed, log_sum, capped = softmax
    dlosses = jnp.where(_exists(targets, e), dlosses, 0)[..., None]
    share = 1 / summed
    if z_loss:
        share = share * (1 + 2 * z_loss * log_sum)
    du = e * share - jnp.where(_is_label(targets, e), 1 - label_smoothing, 0)
    if label_smoothing:
        du = du - label_smoothing / e.shape[-1]
    if soft_cap is not None and capped is not None:
        du = du * (1 - jnp.square(capped / soft_cap))
    return masked(dlosses, du)


def _known(x: Array, weights: Array) -> Array:
    return jnp.where((weights[..., None] == 0) & ~jnp.isfinite(x), 0, x)


def _at_label(u: Array, targets: Array) -> Array:
    """The logit of each position's label; any other where that does not exist."""
    if explicit_sharding(u) is not None:
        return jnp.sum(jnp.where(_is_label(targets, u), u, 0), -1)
    return jnp.take_along_axis(u, targets[..., None], -1, mode="clip")[..., 0]


def _is_label(targets: Array, logits: Array) -> Array:
    ids = lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return targets[..., None] == ids


def _exists(targets: Array, logits: Array) -> Array:
    return (targets >= 0) & (targets < logits.shape[-1])


def _check(
    x: Array,
    w: Array,
    targets: Array,
    tied: bool,
    soft_cap: float | None,
    z_loss: float,
    rows: int | None,
) -> None:
    name = "linear_cross_entropy"
    need_floating(name, x)
    need_floating(name, w, "w")
    need_integers(name, "labels", targets)
    if x.ndim < 2 or w.ndim != 2 or w.shape[1 if tied else 0] != x.shape[-1] or 0 in w.shape:
        raise ValueError(
            f"{name} needs x of shape (B, ..., D) and "
            f"{'a table w (V, D), as tied=True says' if tied else 'weights w (D, V)'}; got "
            f"{x.shape} and {w.shape}; a table (V, D) has tied=True, weights (D, V) have not"
        )
    if targets.shape != x.shape[:-1]:
        raise ValueError(
            f"{name} needs, for x {x.shape}, labels of shape {x.shape[:-1]}; got {targets.shape}"
        )
    if soft_cap is not None and not number(f"{name}'s soft_cap", soft_cap) > 0:
        raise ValueError(f"{name} needs soft_cap above 0, or None for no cap; got {soft_cap}")
    if not number(f"{name}'s z_loss", z_loss) >= 0:
        raise ValueError(f"{name} needs z_loss of 0 or more, got {z_loss}")
    if rows is not None and whole_number(f"{name}'s rows", rows) < 1:
        raise ValueError(f"{name} needs at least 1 row at a time, got rows={rows}")


def linear_cross_entropy_reference(
    x: Array,
    w: Array,
    targets: Array,
    weights: Array | None = None,
    *,
    tied: bool = False,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    rows: int | None = None,
) -> Sum:
    logits = upcast(x @ (w.T if tied else w).astype(x.dtype))
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    t = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    t = t * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
    losses = -jnp.sum(t * jax.nn.log_softmax(logits), -1)
    losses = losses + z_loss * jax.nn.logsumexp(logits, -1) ** 2
    return weighted_sum("linear_cross_entropy", losses, weights)


linear_cross_entropy = Op(
    "linear_cross_entropy",
    linear_cross_entropy_forward,
    linear_cross_entropy_backward,
    linear_cross_entropy_reference,
)
