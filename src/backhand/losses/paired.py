"""A loss of two predictions, each the other's target."""

import jax.numpy as jnp
from jax import Array

from backhand.losses.common import check_weights
from backhand.protocol import Loss
from backhand.visit import PyTree


def paired(loss: Loss) -> Loss:
    """A loss of predictions (x, y): `loss` of x with y for its targets. Both are blamed.

    So two encoders, or one of two views, train together: a batch of an objective has no targets.

    Args:
        loss: of floating-point predictions and targets, such as `info_nce` and `cosine_distance`.

    Raises:
        TypeError: for what is no loss, or one without targets; when run, for a y that `loss` has no
            error for.
        ValueError: when run, for predictions that are neither a tuple of two nor one array
            (B, 2, ...) of them.

    Example:
        Encoders of pictures (B, 6) and of texts (B, 3):

        >>> import backhand as bh, jax, jax.numpy as jnp
        >>> both = bh.chain(bh.on(0, bh.dense(4)), bh.on(1, bh.dense(4)))
        >>> clip = bh.objective(both, bh.losses.paired(bh.losses.info_nce))
        >>> batch = {"inputs": (jnp.eye(5, 6), jnp.ones((5, 3)))}
        >>> value, grads = bh.value_and_grad(clip)(clip.init(jax.random.key(0), batch), batch)
        >>> [part["w"].shape for part in grads]
        [(6, 4), (3, 4)]

        One encoder of two views:

        >>> one = bh.share(bh.chain(a=bh.on(0, bh.dense(4)), b=bh.on(1, bh.dense(4))), {"b": "a"})
        >>> simclr = bh.objective(one, bh.losses.paired(bh.losses.info_nce))
        >>> list(simclr.init(jax.random.key(0), {"inputs": (jnp.eye(5, 6), jnp.ones((5, 6)))}))
        ['a']

    References:
        Radford et al., "Learning transferable visual models from natural language supervision",
        2021; Chen et al., "A simple framework for contrastive learning of visual representations",
        2020.
    """
    if not getattr(loss, "has_targets", False):
        raise TypeError(
            f"paired needs a loss with targets, such as bh.losses.info_nce, got {loss!r}"
        )

    def forward(
        predictions: PyTree, targets: None = None, weights: Array | None = None
    ) -> tuple[PyTree, PyTree]:
        if targets is not None:
            raise TypeError("paired has no targets: predictions (x, y) are each other's")
        total, residuals = loss.forward(*_two(predictions), weights)
        return total, (predictions, residuals)

    def backward(residuals: PyTree, dy: PyTree) -> tuple[PyTree, None, Array | None]:
        predictions, of_loss = residuals
        dx, dtargets, dweights = loss.cotangents(of_loss, dy)
        if dtargets is None:
            raise TypeError(
                f"paired needs a loss with an error for its targets, unlike {loss.name}"
            )
        apart = isinstance(predictions, tuple)
        return (dx, dtargets) if apart else jnp.stack((dx, dtargets), 1), None, dweights

    def reference(
        predictions: PyTree, targets: None = None, weights: Array | None = None
    ) -> PyTree:
        x, y = predictions if isinstance(predictions, tuple) else jnp.moveaxis(predictions, 1, 0)
        return loss.reference(x, y, weights)

    return Loss("paired", forward, backward, reference, check_weights, has_targets=False)


def _two(predictions: PyTree) -> tuple[Array, Array]:
    """Both predictions.

    Raises:
        ValueError: if there are not two.
    """
    if isinstance(predictions, tuple):
        found, got = predictions, f"a tuple of {len(predictions)}"
    else:
        shape = getattr(predictions, "shape", ())
        got = f"shape {shape}" if shape else type(predictions).__name__
        found = (predictions[:, 0], predictions[:, 1]) if shape[1:2] == (2,) else ()
    if len(found) != 2:
        raise ValueError(
            f"paired needs predictions (x, y), or one array (B, 2, ...) of them; got {got}"
        )
    return found
