"""From predictions to one number: where blame begins."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from backhand.audit.exercises.task import Task
from backhand.catalogue import Spec
from backhand.visit import Residuals


def mean_squared_error_forward(
    predictions: Float[Array, "B D"], targets: Float[Array, "B D"]
) -> tuple[Float[Array, ""], Residuals]:
    """y = the mean over all elements of (predictions - targets)^2."""
    error = predictions - targets
    return jnp.mean(error**2), error


def mean_squared_error_backward(residuals: Residuals, dy: Float[Array, ""]) -> tuple[Array, Array]:
    dpredictions = 2 * residuals * dy / residuals.size
    return dpredictions, -dpredictions


def softmax_forward(x: Float[Array, "B D"]) -> tuple[Float[Array, "B D"], Residuals]:
    """y_i = exp(x_i) / sum over j of exp(x_j), in each row."""
    powers = jnp.exp(x - jnp.max(x, axis=1, keepdims=True))
    y = powers / jnp.sum(powers, axis=1, keepdims=True)
    return y, y


def softmax_backward(residuals: Residuals, dy: Float[Array, "B D"]) -> Array:
    y = residuals
    return y * (dy - jnp.sum(y * dy, axis=1, keepdims=True))


def softmax_cross_entropy_forward(
    logits: Float[Array, "B V"], labels: Int[Array, " B"]
) -> tuple[Float[Array, ""], Residuals]:
    """y = the mean over examples of -log p[label], with p = softmax(logits)."""
    shifted = logits - jnp.max(logits, axis=1, keepdims=True)
    log_p = shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=1, keepdims=True))
    of_label = jnp.take_along_axis(log_p, labels[:, None], axis=1)
    return -jnp.mean(of_label), (jnp.exp(log_p), labels)


def softmax_cross_entropy_backward(
    residuals: Residuals, dy: Float[Array, ""]
) -> tuple[Array, None]:
    p, labels = residuals
    truth = (labels[:, None] == jnp.arange(p.shape[1])[None, :]).astype(p.dtype)
    return (p - truth) * dy / len(labels), None


TASKS = (
    Task(
        "mean_squared_error",
        2,
        mean_squared_error_forward,
        mean_squared_error_backward,
        {"predictions": Spec("normal", "5 3"), "targets": Spec("normal", "5 3")},
        "A difference, a square and a mean, one after the other. The targets are an input too: "
        "what is their blame?",
        (
            "You have done a square and a mean. Apply them in reverse, the mean first.",
            "predictions - targets: one side enters as it is, the other with a minus.",
            "The forward divides by the number of all elements, not of rows.",
        ),
    ),
    Task(
        "softmax",
        3,
        softmax_forward,
        softmax_backward,
        {"x": Spec("normal", "3 5")},
        "Raising one x raises its own y, and lowers all others of the row. Write the derivative of "
        "y_i by x_j for i = j and for i != j, then add up over i.",
        (
            "Both derivatives can be written with y alone.",
            "Adding a number to a whole row of x does not change y. So each row of dx sums to 0: "
            "does yours?",
            "Each dy is held against one number for its row: the average of dy, weighed by y.",
        ),
    ),
    Task(
        "softmax_cross_entropy",
        3,
        softmax_cross_entropy_forward,
        softmax_cross_entropy_backward,
        {"logits": Spec("normal", "3 5"), "labels": Spec("ids", "3", below="5")},
        "Softmax and logarithm together are far simpler than apart. Labels are integers: they have "
        "no cotangent, so return None for them.",
        (
            "-log p[label] = log(sum of exp) - logit[label]. Two terms; take the derivative of "
            "each by every logit.",
            "The derivative of log(sum of exp) is something that is among the residuals.",
            "Blame is what was predicted, less what was true. And the forward took a mean over "
            "the examples.",
        ),
    ),
)
