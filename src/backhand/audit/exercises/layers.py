"""Parameters, and the sums and windows that they meet an input in."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from backhand.audit.exercises.task import Task
from backhand.catalogue import Spec
from backhand.visit import Residuals


def bias_forward(
    x: Float[Array, "B D"], b: Float[Array, " D"]
) -> tuple[Float[Array, "B D"], Residuals]:
    """y = x + b, the same b for every row of x."""
    return x + b[None, :], ()


def bias_backward(residuals: Residuals, dy: Float[Array, "B D"]) -> tuple[Array, Array]:
    return dy, jnp.sum(dy, axis=0)


def linear_forward(
    x: Float[Array, "B I"], w: Float[Array, "I O"], b: Float[Array, " O"]
) -> tuple[Float[Array, "B O"], Residuals]:
    """y = x w + b."""
    return x @ w + b[None, :], (x, w)


def linear_backward(residuals: Residuals, dy: Float[Array, "B O"]) -> tuple[Array, Array, Array]:
    x, w = residuals
    return dy @ w.T, x.T @ dy, jnp.sum(dy, axis=0)


def max_pool_forward(x: Float[Array, "B H W"]) -> tuple[Float[Array, "B h w"], Residuals]:
    """y = the largest of each window of 2 x 2; windows do not overlap."""
    batch, height, width = x.shape
    windows = x.reshape(batch, height // 2, 2, width // 2, 2)
    return jnp.max(windows, axis=(2, 4)), x


def max_pool_backward(residuals: Residuals, dy: Float[Array, "B h w"]) -> Array:
    x = residuals
    batch, height, width = x.shape
    windows = x.reshape(batch, height // 2, 2, width // 2, 2)
    largest = windows == jnp.max(windows, axis=(2, 4), keepdims=True)
    return jnp.where(largest, dy[:, :, None, :, None], 0).reshape(x.shape)


def rms_norm_forward(
    x: Float[Array, "B D"], scale: Float[Array, " D"]
) -> tuple[Float[Array, "B D"], Residuals]:
    """y = scale x / r, with r the root of the mean of x^2 in each row."""
    r = jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True) + 1e-5)
    return scale[None, :] * x / r, (x, r, scale)


def rms_norm_backward(residuals: Residuals, dy: Float[Array, "B D"]) -> tuple[Array, Array]:
    x, r, scale = residuals
    h, g = x / r, dy * scale[None, :]
    dx = (g - h * jnp.mean(g * h, axis=1, keepdims=True)) / r
    return dx, jnp.sum(dy * h, axis=0)


def layer_norm_forward(
    x: Float[Array, "B D"], scale: Float[Array, " D"], offset: Float[Array, " D"]
) -> tuple[Float[Array, "B D"], Residuals]:
    """y = scale h + offset, with h = (x - mean) / std of each row."""
    mean = jnp.mean(x, axis=1, keepdims=True)
    std = jnp.sqrt(jnp.mean((x - mean) ** 2, axis=1, keepdims=True) + 1e-5)
    h = (x - mean) / std
    return scale[None, :] * h + offset[None, :], (h, std, scale)


def layer_norm_backward(
    residuals: Residuals, dy: Float[Array, "B D"]
) -> tuple[Array, Array, Array]:
    h, std, scale = residuals
    g = dy * scale[None, :]
    mean = jnp.mean(g, axis=1, keepdims=True)
    along = jnp.mean(g * h, axis=1, keepdims=True)
    return (g - mean - h * along) / std, jnp.sum(dy * h, axis=0), jnp.sum(dy, axis=0)


_FEATURES = Spec("normal", "5")

TASKS = (
    Task(
        "bias",
        2,
        bias_forward,
        bias_backward,
        {"x": Spec("normal", "3 5"), "b": _FEATURES},
        "x meets each number once; b is added to every row. Which of the two has blame to add up?",
        (
            "Adding passes blame on unchanged, to both sides.",
            "b was repeated for every row. Repeating forward is summing backward.",
            "dy is (B, D) and db is (D,): one axis has to go.",
        ),
    ),
    Task(
        "linear",
        2,
        linear_forward,
        linear_backward,
        {"x": Spec("normal", "5 3"), "w": Spec("normal", "3 7"), "b": Spec("normal", "7")},
        "Write one element, y_bo = sum over i of x_bi w_io + b_o, and ask each letter on the right "
        "for its part in it. The shapes leave little choice.",
        (
            "Each cotangent has the shape of its own argument. Which products of dy, x and w have "
            "that shape?",
            "Blame goes back along the arrows that the signal came by: through w in the other "
            "direction.",
            "dw pairs what came in with the error that goes out, for every example, and adds up "
            "over the examples. b is a bias as in the exercise before.",
        ),
    ),
    Task(
        "max_pool",
        3,
        max_pool_forward,
        max_pool_backward,
        {"x": Spec("normal", "3 6 10")},
        "Of the four numbers of a window only one reaches the output. Who gets the blame?",
        (
            "Change a number that is not the largest of its window. Does y move?",
            "Find where the largest was: compare each window with its maximum, as the forward "
            "shaped it.",
            "dy has one number for each window. Put it where the largest was, and 0 elsewhere; "
            "then give it the shape of x again.",
        ),
    ),
    Task(
        "rms_norm",
        4,
        rms_norm_forward,
        rms_norm_backward,
        {"x": Spec("normal", "3 5"), "scale": _FEATURES},
        "x acts on y twice: directly, and through r, in which every element of the row has a part. "
        "Add both paths up.",
        (
            "Go through h = x / r: y = scale h. The blame of h and of scale is simple.",
            "The path through r: dr is a sum over the row, and r depends on each x by the rules "
            "for a root, a mean and a square.",
            "Both paths together take out of the blame of h its part along h itself. Scaling a row "
            "does not change y, so dx must be at right angles to x, nearly.",
        ),
    ),
    Task(
        "layer_norm",
        4,
        layer_norm_forward,
        layer_norm_backward,
        {"x": Spec("normal", "3 5"), "scale": _FEATURES, "offset": _FEATURES},
        "x acts on y by three paths: directly, through the mean, and through the standard "
        "deviation. The residuals hold all that is needed: h, std and scale.",
        (
            "First scale and offset: they are used in every row, as a bias is. Then comes h.",
            "Adding a number to a whole row does not change y, and nor does scaling the row. So "
            "two things must be absent from dx.",
            "Take out of the blame of h its mean over the row, and its part along h; what is left "
            "is divided by what the forward divided by.",
        ),
    ),
)
