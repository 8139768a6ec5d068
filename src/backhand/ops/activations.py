"""Activations: elementwise nonlinearities, and softmax.

An elementwise y = f(x) shares blame elementwise: dx = dy f'(x). Where f' can be had from y, y is
what is saved: the next layer keeps it anyway as its input, so it costs nothing.
"""

import jax
import jax.numpy as jnp
from jax.scipy.special import erf
from jaxtyping import Array, Float

from backhand.arrays import flag, upcast
from backhand.protocol import Op, need_floating

X = Float[Array, "*shape"]

# relu ---------------------------------------------------------------------------------------------


def relu_forward(x: X) -> tuple[X, X]:
    """max(x, 0); its derivative is 1 where x > 0, else 0 (at 0 too, as `jax.nn.relu` has it).

    Saves y: y > 0 exactly where x > 0.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.relu(jnp.array([-1.0, 2.0])).tolist()
        [0.0, 2.0]

    References:
        Glorot, Bordes and Bengio, "Deep sparse rectifier neural networks", 2011.
    """
    need_floating("relu", x)
    y = jnp.maximum(x, 0)
    return y, y


def relu_backward(y: X, dy: X) -> X:
    return jnp.where(y > 0, dy, jnp.zeros_like(dy))


relu = Op("relu", relu_forward, relu_backward, jax.nn.relu)

# leaky_relu ---------------------------------------------------------------------------------------


def leaky_relu_forward(x: X, *, negative_slope: float = 0.01) -> tuple[X, X]:
    """x where x >= 0, else negative_slope x; the derivative is 1 or negative_slope likewise.

    Saves x.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.leaky_relu(jnp.array([-1.0, 2.0]), negative_slope=0.5).tolist()
        [-0.5, 2.0]

    References:
        Maas, Hannun and Ng, "Rectifier nonlinearities improve neural network acoustic
        models", 2013.
    """
    need_floating("leaky_relu", x)
    return jnp.where(x >= 0, x, negative_slope * x), x


def leaky_relu_backward(x: X, dy: X, *, negative_slope: float = 0.01) -> X:
    return jnp.where(x >= 0, dy, negative_slope * dy)


leaky_relu = Op("leaky_relu", leaky_relu_forward, leaky_relu_backward, jax.nn.leaky_relu)

# sigmoid ------------------------------------------------------------------------------------------


def sigmoid_forward(x: X) -> tuple[X, X]:
    """1 / (1 + exp(-x)); the derivative is y (1 - y).

    At most 1/4: a deep stack of sigmoids loses at least that factor of its blame at each layer, so
    gradients vanish.

    Example:
        >>> import backhand as bh
        >>> float(bh.ops.sigmoid(0.0))
        0.5
    """
    need_floating("sigmoid", x)
    y = jax.lax.logistic(x)
    return y, y


def sigmoid_backward(y: X, dy: X) -> X:
    return dy * y * (1 - y)


sigmoid = Op("sigmoid", sigmoid_forward, sigmoid_backward, jax.nn.sigmoid)

# tanh ---------------------------------------------------------------------------------------------


def tanh_forward(x: X) -> tuple[X, X]:
    """tanh(x); the derivative is 1 - y^2.

    Example:
        >>> import backhand as bh
        >>> float(bh.ops.tanh(0.0))
        0.0
    """
    need_floating("tanh", x)
    y = jnp.tanh(x)
    return y, y


def tanh_backward(y: X, dy: X) -> X:
    return dy * (1 - y) * (1 + y)


tanh = Op("tanh", tanh_forward, tanh_backward, jnp.tanh)

# gelu ---------------------------------------------------------------------------------------------

_SQRT_HALF = 0.5**0.5
_SQRT_2_OVER_PI = (2 / jnp.pi) ** 0.5
_CUBIC = 0.044715


def gelu_forward(x: X, *, approximate: bool = False) -> tuple[X, X]:
    """x Phi(x), with Phi the distribution function of the standard normal, phi its density.

    The derivative is Phi(x) + x phi(x). With `approximate`, Phi(x) is taken as
    (1 + tanh u) / 2, where u = sqrt(2/pi) (x + 0.044715 x^3), and the derivative is that of the
    approximation: (1 + tanh u) / 2 + x (1 - tanh^2 u) u' / 2.

    Phi is (1 + erf(x / sqrt 2)) / 2, in half the time of erfc: it is off by a rounding of 1, so
    that below -5, where Phi is smaller than that, y and its derivative have few right digits.

    Saves x.

    Example:
        >>> import backhand as bh
        >>> round(float(bh.ops.gelu(1.0)), 4), round(float(bh.ops.gelu(1.0, approximate=True)), 4)
        (0.8413, 0.8412)

    References:
        Hendrycks and Gimpel, "Gaussian error linear units (GELUs)", 2016.
    """
    need_floating("gelu", x)
    flag("gelu's approximate", approximate)
    half = 0.5 * upcast(x)
    return (half + half * _erf(upcast(x), approximate)).astype(x.dtype), x


def gelu_backward(x: X, dy: X, *, approximate: bool = False) -> X:
    wide, half = upcast(x), 0.5 * upcast(dy)
    e = _erf(wide, approximate)
    if approximate:
        du = _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * wide**2)
        rest = wide * (1 - e) * (1 + e) * du
    else:
        rest = wide * jnp.exp(-0.5 * wide**2) * _SQRT_2_OVER_PI
    return (half + half * (e + rest)).astype(dy.dtype)


def _erf(x: Array, approximate: bool) -> Array:
    """2 Phi(x) - 1: exactly by erf, or approximately by tanh.

    A half and a half of it round less than Phi(x), which is a sum already.
    """
    if approximate:
        return jnp.tanh(_SQRT_2_OVER_PI * (x + _CUBIC * x**3))
    return erf(_SQRT_HALF * x)


def gelu_reference(x: Array, *, approximate: bool = False) -> Array:
    return jax.nn.gelu(x, approximate=approximate)


gelu = Op("gelu", gelu_forward, gelu_backward, gelu_reference)

# silu ---------------------------------------------------------------------------------------------


def silu_forward(x: X) -> tuple[X, X]:
    """x s, with s = sigmoid(x); the derivative is s + x s (1 - s).

    Also known as swish. Saves x.

    Example:
        >>> import backhand as bh
        >>> round(float(bh.ops.silu(1.0)), 4)
        0.7311

    References:
        Elfwing, Uchibe and Doya, "Sigmoid-weighted linear units", 2017.
    """
    need_floating("silu", x)
    return x * jax.lax.logistic(x), x


def silu_backward(x: X, dy: X) -> X:
    s = jax.lax.logistic(x)
    return dy * s + dy * x * (s * (1 - s))  # rounded less than dy (s + ...)


silu = Op("silu", silu_forward, silu_backward, jax.nn.silu)

# softplus -----------------------------------------------------------------------------------------


def softplus_forward(x: X) -> tuple[X, X]:
    """log(1 + exp(x)), without overflow; the derivative is sigmoid(x).

    Saves x. The derivative is 1 - exp(-y) too, but near y = 0 that needs expm1, which takes longer
    than all of this on CPU.

    Example:
        >>> import backhand as bh
        >>> round(float(bh.ops.softplus(0.0)), 4)
        0.6931

    References:
        Dugas et al., "Incorporating second-order functional knowledge", 2001.
    """
    need_floating("softplus", x)
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x))), x


def softplus_backward(x: X, dy: X) -> X:
    e = jnp.exp(-jnp.abs(x))
    return dy * jnp.where(x >= 0, 1, e) / (1 + e)


softplus = Op("softplus", softplus_forward, softplus_backward, jax.nn.softplus)

# elu ----------------------------------------------------------------------------------------------


def elu_forward(x: X, *, alpha: float = 1.0) -> tuple[X, X]:
    """x where x > 0, else alpha (exp(x) - 1); the derivative is 1, or alpha exp(x).

    Saves x.

    Example:
        >>> import backhand as bh
        >>> round(float(bh.ops.elu(-1.0)), 4)
        -0.6321

    References:
        Clevert, Unterthiner and Hochreiter, "Exponential linear units (ELUs)", 2015.
    """
    need_floating("elu", x)
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0))), x


def elu_backward(x: X, dy: X, *, alpha: float = 1.0) -> X:
    return jnp.where(x > 0, dy, dy * (alpha * jnp.exp(jnp.minimum(x, 0))))


elu = Op("elu", elu_forward, elu_backward, jax.nn.elu)

# softmax ------------------------------------------------------------------------------------------


def softmax_forward(x: X, *, axis: int = -1) -> tuple[X, X]:
    """y_i = exp(x_i) / sum_j exp(x_j), computed in at least float32.

    Raising one probability lowers the others: dy_i/dx_j = y_i (1[i=j] - y_j), so

        dx_i = y_i (dy_i - sum_j y_j dy_j).

    Raises:
        ValueError: if x has no such axis.

    Example:
        >>> import backhand as bh, jax.numpy as jnp
        >>> bh.ops.softmax(jnp.zeros(4)).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    need_floating("softmax", x)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"softmax over axis {axis} needs x to have it, got shape {x.shape}")
    wide = upcast(x)
    e = jnp.exp(wide - jnp.max(wide, axis, keepdims=True, initial=-jnp.inf))
    y = (e / jnp.sum(e, axis, keepdims=True)).astype(x.dtype)
    return y, y


def softmax_backward(y: X, dy: X, *, axis: int = -1) -> X:
    wide, error = upcast(y), upcast(dy)
    return (wide * (error - jnp.sum(wide * error, axis, keepdims=True))).astype(dy.dtype)


def softmax_reference(x: Array, *, axis: int = -1) -> Array:
    return jax.nn.softmax(upcast(x), axis).astype(x.dtype)


softmax = Op("softmax", softmax_forward, softmax_backward, softmax_reference)
