"""One rule at a time: a factor, a power, a sum, a curve, a kink."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from backhand.audit.exercises.task import Task
from backhand.catalogue import Spec
from backhand.visit import Residuals


def scale_forward(
    a: Float[Array, ""], x: Float[Array, "B D"]
) -> tuple[Float[Array, "B D"], Residuals]:
    """y = a x, with one number a for the whole of x."""
    return a * x, (a, x)


def scale_backward(residuals: Residuals, dy: Float[Array, "B D"]) -> tuple[Array, Array]:
    a, x = residuals
    return jnp.sum(x * dy), a * dy


def square_forward(x: Float[Array, "B D"]) -> tuple[Float[Array, "B D"], Residuals]:
    """y = x^2, each element by itself."""
    return x * x, x


def square_backward(residuals: Residuals, dy: Float[Array, "B D"]) -> Array:
    return 2 * residuals * dy


def sum_forward(x: Float[Array, "B D"]) -> tuple[Float[Array, " B"], Residuals]:
    """y_b = sum over d of x_bd."""
    return jnp.sum(x, axis=1), x


def sum_backward(residuals: Residuals, dy: Float[Array, " B"]) -> Array:
    return jnp.broadcast_to(dy[:, None], residuals.shape)


def mean_forward(x: Float[Array, "B D"]) -> tuple[Float[Array, ""], Residuals]:
    """y = the mean of all elements of x."""
    return jnp.mean(x), x


def mean_backward(residuals: Residuals, dy: Float[Array, ""]) -> Array:
    return jnp.full_like(residuals, dy / residuals.size)


def sigmoid_forward(x: Float[Array, "B D"]) -> tuple[Float[Array, "B D"], Residuals]:
    """y = 1 / (1 + exp(-x)), each element by itself."""
    y = 1 / (1 + jnp.exp(-x))
    return y, y


def sigmoid_backward(residuals: Residuals, dy: Float[Array, "B D"]) -> Array:
    y = residuals
    return dy * y * (1 - y)


def relu_forward(x: Float[Array, "B D"]) -> tuple[Float[Array, "B D"], Residuals]:
    """y = x where x is positive, and 0 elsewhere."""
    return jnp.where(x > 0, x, 0), x


def relu_backward(residuals: Residuals, dy: Float[Array, "B D"]) -> Array:
    return jnp.where(residuals > 0, dy, 0)


_X = Spec("normal", "5 3")

TASKS = (
    Task(
        "scale",
        1,
        scale_forward,
        scale_backward,
        {"a": Spec("normal"), "x": _X},
        "How far does y move when x moves by a little? And when a does, which has a part in every "
        "element of y at once?",
        (
            "Write one element down, y_bd = a x_bd, and take its two derivatives.",
            "a is used once for each element. Each use sends blame back to a.",
            "What is used many times collects the blame of all its uses: da is one number, added "
            "up from all of x and dy.",
        ),
    ),
    Task(
        "square",
        1,
        square_forward,
        square_backward,
        {"x": _X},
        "What is the slope of a parabola at x? Blame that comes in is multiplied by it.",
        (
            "Each element of y depends on one element of x: nothing is summed.",
            "x * x uses x twice. Each of the two uses sends blame back.",
            "The rule for powers gives the slope; the chain rule multiplies it by dy.",
        ),
    ),
    Task(
        "sum",
        1,
        sum_forward,
        sum_backward,
        {"x": _X},
        "A row of x is added up to one number. What does each of its elements get of the blame of "
        "that number?",
        (
            "Raise one element of a row by 1. By how much does the sum rise?",
            "Every element of a row has the same part in its sum, so all get the same.",
            "dy has one number for each row, dx one for each element: the number is repeated along "
            "the axis that was summed.",
        ),
    ),
    Task(
        "mean",
        1,
        mean_forward,
        mean_backward,
        {"x": _X},
        "As for a sum, but each element now has only a share in the result. How large a share?",
        (
            "A mean is a sum, divided by a number. Both have a derivative that you know.",
            "What the forward divides by, the backward divides by too.",
            "All elements get the same number. Count the elements of x.",
        ),
    ),
    Task(
        "sigmoid",
        2,
        sigmoid_forward,
        sigmoid_backward,
        {"x": _X},
        "The residual is y, not x. Find the derivative of the curve, and write it in terms of y "
        "alone.",
        (
            "Begin with y = 1 / u and u = 1 + exp(-x), and use the chain rule.",
            "The result holds exp(-x) and u. Both can be said with y: 1 / u is y itself.",
            "The slope is zero where y is 0 or 1, and largest in the middle: a product of two "
            "simple factors of y.",
        ),
    ),
    Task(
        "relu",
        2,
        relu_forward,
        relu_backward,
        {"x": _X},
        "Where x is positive, y follows it. Elsewhere y stays where it is. What does that say of "
        "the blame?",
        (
            "Two cases, each with a slope that is a constant.",
            "An input that cannot move the output is not to blame.",
            "Choose element by element with jnp.where, by the same condition as the forward.",
        ),
    ),
)
