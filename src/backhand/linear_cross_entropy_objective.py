"""The objective of a language model: output layer and cross-entropy in one."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer, lecun_normal, normal

from backhand.arrays import accumulation_dtype, whole_number
from backhand.combinators import chain, share
from backhand.contributions import Outer
from backhand.gradients import Objective, objective
from backhand.losses import linear_cross_entropy
from backhand.losses.classification import check_labels
from backhand.losses.linear_cross_entropy import WholeResiduals, known, logit_error
from backhand.ops.linear import linear_dx
from backhand.protocol import Layer, Loss, layer, need_floating
from backhand.visit import Params, PyTree, Residuals


def linear_cross_entropy_objective(
    trunk: Layer,
    vocabulary: int,
    *,
    tied: str | None = None,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    rows: int | None = None,
    initializer: Initializer | None = None,
) -> Objective:
    """The mean cross-entropy of softmax(trunk(inputs) w), whose logits never exist whole.

    The same loss and gradients as `bh.objective(bh.chain(trunk=trunk, output=bh.dense(V,
    bias=False)), bh.losses.softmax_cross_entropy)`, in a fraction of the memory where V is large;
    see `bh.losses.linear_cross_entropy`.

    Logits, to predict from, are `trunk(params["trunk"], x) @ params["output"]["w"]`, or times the
    transpose of a tied table, and then soft-capped if that is set. The other objective above has
    the same parameters where no table is tied: it takes metrics of the logits.

    Parameters: "trunk", and "output" with w (D, V), unless that is tied. Once the logits are many,
    the gradient of w is summed while they are at hand: then it has no per-example norms, and asking
    for them is an error that says so.

    Args:
        trunk: from inputs to (B, ..., D), without the output layer.
        vocabulary: V; targets are integers in [0, V).
        tied: the path in the trunk's parameters of a table (V, D) to use for the output too, its
            keys joined by "/": "tokens/table". None for an output with weights of its own.
        soft_cap: the bound of |logits|, None for none.
        z_loss: how much the square of their log-sum-exp counts.
        label_smoothing: s in [0, 1].
        rows: how many rows of logits there are at a time; None for what is fast.
        initializer: of w; LeCun's normal by default. A tied table has the embedding's.

    Raises:
        TypeError: if the trunk is no layer, or another argument not of its type.
        ValueError: if V < 1, or for an initializer of a tied table; at init, for a path that does
            not exist, or a table of another shape.

    Example:
        >>> import backhand as bh
        >>> trunk = bh.chain(tokens=bh.embedding(100, 8), norm=bh.layer_norm())
        >>> loss = bh.linear_cross_entropy_objective(trunk, 100, tied="tokens/table")
        >>> ids = jnp.arange(12).reshape(2, 6)
        >>> batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> bh.compare(loss, params, batch).agrees
        True
        >>> features = trunk(params["trunk"], batch["inputs"])
        >>> logits = features @ params["trunk"]["tokens"]["table"].T
        >>> whole = bh.losses.softmax_cross_entropy(logits, batch["targets"])
        >>> bool(jnp.allclose(whole[0] / whole[1], loss(params, batch)))
        True
    """
    if not isinstance(trunk, Layer):
        raise TypeError(f"linear_cross_entropy_objective needs a layer as its trunk, got {trunk!r}")
    if whole_number("linear_cross_entropy_objective's vocabulary", vocabulary) < 1:
        raise ValueError(f"linear_cross_entropy_objective needs vocabulary >= 1, got {vocabulary}")
    if tied is not None and not isinstance(tied, str):
        raise TypeError(f"tied must be the path of a table, such as 'tokens/table', got {tied!r}")
    if tied is not None and initializer is not None:
        raise ValueError(f"the table at {tied!r} has an initializer already: give none beside tied")
    settings = {
        "soft_cap": soft_cap,
        "z_loss": z_loss,
        "label_smoothing": label_smoothing,
        "rows": rows,
    }
    output = _output(vocabulary, tied is not None, initializer, settings)
    model = chain(trunk=trunk, output=output)
    if tied is not None:
        model = share(model, {"output": f"trunk/{tied}"})
    return objective(model, _already_a_loss(vocabulary))


def _output(
    vocabulary: int, tied: bool, initializer: Initializer | None, settings: dict[str, Any]
) -> Layer:
    """From (B, ..., D) to the sum and weight of the losses; a tied table is its parameters."""
    make = initializer or (normal(0.02) if tied else lecun_normal())
    op = linear_cross_entropy.bind(tied=tied, **settings)

    def init(key: Array, x: jax.ShapeDtypeStruct) -> Params:
        need_floating("linear_cross_entropy", x)
        shape = (vocabulary, x.shape[-1]) if tied else (x.shape[-1], vocabulary)
        w = make(key, shape, accumulation_dtype(x.dtype))
        return w if tied else {"w": w}

    def forward(
        params: Params, x: Array, *, targets: Array, weights: Array | None = None
    ) -> tuple[tuple[Array, Array], Residuals]:
        return op.forward(x, params if tied else params["w"], targets, weights)

    def rule(params: Params, residuals: Residuals, dy: PyTree) -> tuple[PyTree, Array]:
        if isinstance(residuals, WholeResiduals):
            x, w, *_ = residuals
            error = logit_error(residuals, dy, soft_cap, z_loss, label_smoothing)
            dw: PyTree = Outer(error, known(residuals)) if tied else Outer(known(residuals), error)
            dx = linear_dx(error, w.T if tied else w, x)
        else:
            dx, dw, *_ = op.cotangents(residuals, dy)
        return dw if tied else {"w": dw}, dx

    soft_cap, z_loss, label_smoothing = (
        settings[name] for name in ("soft_cap", "z_loss", "label_smoothing")
    )
    return layer("linear_cross_entropy", init, forward, rule)


def _already_a_loss(vocabulary: int) -> Loss:
    """The loss of a model that gives its sum and weight itself."""

    def forward(
        y: PyTree, targets: Array, weights: Array | None = None
    ) -> tuple[PyTree, tuple[()]]:
        return y, ()

    def check(y: Any, targets: Any, weights: Any) -> None:
        check_labels(jax.ShapeDtypeStruct((vocabulary,), jnp.float32), targets, weights)

    return Loss(
        "linear_cross_entropy",
        forward,
        lambda residuals, dy: (dy, None, None),
        lambda y, targets, weights=None: y,
        check,
    )
