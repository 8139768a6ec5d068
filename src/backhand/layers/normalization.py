"""Normalization layers."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from backhand import ops
from backhand.arrays import accumulation_dtype, last_axis, like_primal, upcast
from backhand.contributions import Moments, Running, Total
from backhand.ops.normalization import Residuals, affine, normalization_backward
from backhand.protocol import Layer, layer, need_floating
from backhand.visit import Params, PyTree


def layer_norm(*, eps: float = 1e-5) -> Layer:
    """Each example's features brought to mean 0 and variance 1, then scaled and shifted.

    Parameters: scale (D,), beginning at one, and offset (D,), beginning at zero. The derivation is
    with `backhand.ops.normalization`.

    Args:
        eps: added to the variance.

    Raises:
        TypeError: if x is not floating point.
    """

    def forward(params: Params, x: Float[Array, "... D"]) -> tuple[Array, PyTree]:
        y, residuals = ops.layer_norm.forward(x, params["scale"], params["offset"], eps=eps)
        return y, (x, residuals.mean, residuals.rstd)

    def rule(params: Params, residuals: PyTree, dy: Array) -> tuple[PyTree, Array]:
        x, mean, rstd = residuals
        own = Residuals(x, mean, rstd, params["scale"], params["offset"])
        dx, dscale, doffset = normalization_backward(own, dy, (dy.ndim - 1,))
        return {"scale": dscale, "offset": doffset}, dx

    return layer("layer_norm", lambda key, x: _init("layer_norm", x), forward, rule)


def batch_norm(*, decay: float = 0.99, eps: float = 1e-5) -> Layer:
    """Each feature brought to mean 0 and variance 1 over the batch, then scaled and shifted.

    While training, by the batch's own statistics; else by running ones, which are kept among the
    parameters as a `Running`. They are not learned: their gradient is zero, `train_step` keeps the
    optimizer from them and merges what the `statistics` collector saw of the step. The variance is
    the biased one (divided by n) in both places.

    Parameters: scale (D,), offset (D,), running (mean and var (D,)). Uses `training`.

    Args:
        decay: the share of the running statistics that a step keeps.
        eps: added to the variance.

    Raises:
        ValueError: for a decay outside [0, 1].
        TypeError: if x is not floating point.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"batch_norm needs a decay in [0, 1], got {decay}")

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        params = _init("batch_norm", x)
        running = Running(jnp.zeros_like(params["offset"]), jnp.ones_like(params["scale"]), decay)
        return {**params, "running": running}

    def forward(
        params: Params, x: Float[Array, "... D"], *, training: bool
    ) -> tuple[Array, PyTree]:
        need_floating("batch_norm", x)
        scale, offset = params["scale"], params["offset"]
        if training:
            y, residuals = ops.batch_norm.forward(x, scale, offset, eps=eps)
            return y, (x, residuals.mean, residuals.rstd)
        own = _by_running(params, x)
        return affine(own.h, scale, offset).astype(x.dtype), x

    def _by_running(params: Params, x: Array) -> Residuals:
        running = lax.stop_gradient(params["running"])
        dtype = accumulation_dtype(x.dtype)
        mean, rstd = running.mean.astype(dtype), 1 / jnp.sqrt(running.var.astype(dtype) + eps)
        own = (x, last_axis(mean, x), last_axis(rstd, x))
        return Residuals(*own, params["scale"], params["offset"])

    def rule(
        params: Params, residuals: PyTree, dy: Array, *, training: bool
    ) -> tuple[PyTree, Array]:
        if training:
            x, mean, rstd = residuals
            own = Residuals(x, mean, rstd, params["scale"], params["offset"])
            dx, dscale, doffset = normalization_backward(own, dy, tuple(range(dy.ndim - 1)))
            seen = _moments(own, params["running"], eps)
            return {"scale": dscale, "offset": doffset, "running": seen}, dx
        own, error = _by_running(params, residuals), upcast(dy)
        dx = error * last_axis(params["scale"].astype(error.dtype), error) * own.rstd
        return {
            "scale": Total(error * own.h),
            "offset": Total(error),
            "running": None,
        }, like_primal(dx, residuals)

    return layer("batch_norm", init, forward, rule)


def _moments(residuals: Residuals, running: Running, eps: float) -> Moments:
    """What the batch adds to the running statistics."""
    count = math.prod(residuals.x.shape[:-1])
    shift = residuals.mean.reshape(-1) - running.mean.astype(residuals.mean.dtype)
    var = 1 / jnp.square(residuals.rstd.reshape(-1)) - eps
    n = jnp.asarray(count, shift.dtype)
    return Moments(n, n * shift, n * (var + jnp.square(shift)))


def _init(name: str, x: jax.ShapeDtypeStruct) -> dict[str, Array]:
    need_floating(name, x)
    if len(x.shape) < 2:
        raise ValueError(f"{name} needs x of shape (B, ..., D), got {x.shape}")
    dtype = accumulation_dtype(x.dtype)
    return {"scale": jnp.ones(x.shape[-1], dtype), "offset": jnp.zeros(x.shape[-1], dtype)}
