"""From a model and a loss to a scalar, and back: the entry of every reverse pass."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from backhand.arrays import flag, inverse, is_floating
from backhand.batch import Batch as Batch
from backhand.batch import check_batch, names_of
from backhand.bounds import Bounds, noted
from backhand.metrics import Reduction, check_names, reduction
from backhand.protocol import Layer, Loss, shapes_of
from backhand.recent import Recent
from backhand.visit import Collect, Params, PyTree, Residuals, apart, together
from backhand.visit import gradients as default_gradients

Metric: TypeAlias = Callable[..., Reduction | tuple[Array, Array]]
Evaluate: TypeAlias = "Callable[..., tuple[Terms, dict[str, PyTree]]]"


class Terms(NamedTuple):
    """What a batch adds to a loss and to the metrics: sums, and the weights to divide them by.

    `total` and `weight` are scalars, or trees of one per term of the loss.
    """

    total: PyTree
    weight: PyTree
    metrics: dict[str, Reduction]

    def mean(self) -> Array:
        """The loss: the terms' means, added up."""
        return _sum(jax.tree.map(lambda t, w: t * inverse(w), self.total, self.weight))

    def measured(self) -> dict[str, PyTree]:
        """The metrics' values."""
        return {name: metric.value() for name, metric in self.metrics.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """A scalar that a batch gives, with both ways to its gradient.

    `bh.objective(model, loss)` makes one; one whose loss has parameters is written by hand.

    Args:
        init: `(key, batch) -> params`.
        forward: `(params, batch, *, key, training) -> (Terms, residuals)`.
        backward: `(params, residuals, dtotal, batch, collect, *, key, training) -> collected`, with
            dtotal the error of `Terms.total`.
        check: `(params, batch, *, key, training) -> None`, run on the host before anything
            compiles; raises for what cannot be right.
        model: the layer whose parts give reports their order; None for the parameters' own.
        untouched: whether what `backward` returns is what the model's own gave it, so that
            something other than gradients may be collected in their place. Accumulation then adds
            to its sums as it goes back; of what is touched, as a sum over objectives is, each
            micro-batch's gradient is made first: the same numbers, in one gradient's more memory.
        names: what of a batch it knows; None if it does not say.
    """

    init: Callable[[Array, Batch], Params]
    forward: Callable[..., tuple[Terms, Residuals]]
    backward: Callable[..., PyTree]
    check: Callable[..., None] = lambda params, batch, **given: None
    model: Layer | None = None
    untouched: bool = False
    names: frozenset[str] | None = None

    def __call__(
        self, params: Params, batch: Batch, *, key: Array | None = None, training: bool = True
    ) -> Array:
        """The mean loss, which `jax.grad` differentiates on its own.

        Args:
            params: what `init` gave.
            batch: `inputs`, `targets`, optionally `weights`, and what else the model uses.
            key: for a model that uses one while training.
            training: False for evaluation.
        """
        self.check(params, batch, key=key, training=training)
        return self.forward(params, _on_device(batch), key=key, training=training)[0].mean()


def objective(
    model: Layer, loss: Loss, *, metrics: Mapping[str, Metric] | None = None
) -> Objective:
    """The mean loss of a model's predictions.

    A batch is a dict: `inputs`, `targets` (unless the loss has none, as `triplet`), optionally
    `weights` (of examples or positions; a mask is a weight of 0), and whatever else the model uses,
    by name. Every array in it has the batch as its first axis.

    Args:
        model: from inputs to predictions.
        loss: from predictions, targets and weights to a sum and a weight.
        metrics: by name, functions of what the loss is a function of; reported, not differentiated
            (see `backhand.metrics`).

    Raises:
        ValueError: for a metric with the name of something that a training step reports
            (`backhand.metrics.RESERVED`); when called, for a batch without inputs or targets, with
            a name that the model does not use, with arrays of different lengths, or, where it comes
            from the host, with values that the loss is not defined at, ids without a row or lengths
            beyond the padding that the model reads as they are; before anything compiles.

    Example:
        >>> import backhand as bh
        >>> loss = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> value, grads = bh.value_and_grad(loss)(params, batch)
        >>> grads["w"].shape
        (3, 1)
    """
    if not isinstance(model, Layer):
        raise TypeError(f"objective(model, loss) needs a layer as its model, got {model!r}")
    if not isinstance(loss, Loss):
        if getattr(loss, "name", None) == "linear_cross_entropy":
            raise TypeError(
                "linear_cross_entropy has an output layer in it: the objective of a trunk with it "
                "is bh.linear_cross_entropy_objective(trunk, vocabulary)"
            )
        raise TypeError(
            "objective needs a loss that gives a sum and a weight, such as "
            f"bh.losses.mean_squared_error; got {loss!r}"
        )
    metrics = dict(metrics or {})
    check_names(metrics)
    from_batch = model.uses - {"key", "training"}
    seen: Recent[tuple[PyTree, list[tuple[int, Bounds]]]] = Recent()

    def side(batch: Batch, key: Array | None, training: bool) -> dict[str, Any]:
        given = {"key": key, "training": training}
        own = {name: given[name] for name in given if name in model.uses}
        return own | {name: batch[name] for name in from_batch if name in batch}

    def init(key: Array, batch: Batch) -> Params:
        check_batch(batch, from_batch, loss.has_targets)
        shapes = jax.eval_shape(lambda: _on_device(batch))
        given = {name: value for name, value in side(shapes, None, False).items() if name != "key"}

        def run(key: Array) -> Params:
            return model.init(key, shapes["inputs"], **given)

        check(jax.eval_shape(run, key), batch, key=key)
        return jax.jit(run)(key)

    def forward(
        params: Params, batch: Batch, *, key: Array | None = None, training: bool = True
    ) -> tuple[Terms, Residuals]:
        predictions, residuals = model.forward(
            params, batch["inputs"], **side(batch, key, training)
        )
        known = (batch.get("targets"), batch.get("weights"))
        (total, weight), of_loss = loss.forward(predictions, *known)
        fixed = jax.lax.stop_gradient(predictions)
        measured = {name: reduction(metric(fixed, *known)) for name, metric in metrics.items()}
        return Terms(total, weight, measured), (residuals, of_loss)

    def backward(
        params: Params,
        residuals: Residuals,
        dtotal: PyTree,
        batch: Batch,
        collect: Collect = default_gradients,
        *,
        key: Array | None = None,
        training: bool = True,
    ) -> PyTree:
        of_model, of_loss = residuals
        dweight = jax.tree.map(jnp.zeros_like, dtotal)
        error = loss.cotangents(of_loss, (dtotal, dweight))[0]
        return model.backward(params, of_model, error, collect, **side(batch, key, training))[0]

    def check(
        params: Params, batch: Any, *, key: Array | None = None, training: bool = False
    ) -> None:
        flag("training", training)
        batch = dict(batch) if isinstance(batch, Mapping) else batch
        leaves, structure = jax.tree.flatten((params, batch))
        shapes = ((np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves)
        known = (structure, key is None, training, *shapes)
        found = seen.find(known)
        if found is None:
            check_batch(batch, from_batch, loss.has_targets)
            found = seen.keep(known, traced(shapes_of(params), shapes_of(batch), key, training))
        shaped, asked = found
        for index, bounds in asked:
            if isinstance(leaves[index], np.ndarray):
                bounds.check(leaves[index])
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(batch)):
            loss.check(shaped, batch.get("targets"), batch.get("weights"))

    def traced(
        params: Params, batch: Batch, key: Array | None, training: bool
    ) -> tuple[PyTree, list[tuple[int, Bounds]]]:
        """The predictions' shapes, every shape of the objective met, and the leaves' bounds."""
        found: list[tuple[int, Bounds]] = []

        def predictions(params: Params, batch: Batch) -> PyTree:
            with noted((params, batch)) as asked:
                y = model(params, batch["inputs"], **side(batch, key, training))
                loss.forward(y, batch.get("targets"), batch.get("weights"))
            found[:] = [(index, bounds) for index, own in enumerate(asked) for bounds in own]
            return y

        return jax.eval_shape(predictions, params, batch), found

    names = names_of(from_batch, loss.has_targets)
    return Objective(init, forward, backward, check, model, untouched=True, names=names)


def check_objective(objective: Any) -> None:
    """Refuses what is not an objective.

    Raises:
        TypeError: saying how to make one.
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            f"needs an objective, made by bh.objective(model, loss); got {type(objective).__name__}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """A function `(params, batch, *, key, training) -> (loss, gradient)` that can be accumulated.

    Made by `value_and_grad`, `value_and_collect`, `value_and_clipped_grad`, and of one of these by
    `accumulate`. It returns the gradient alone where that is all it was made to collect, else a
    dict of what was collected.

    Args:
        objective: what is differentiated.
        evaluate: `(params, batch, *, scale=None, key=None, training=True) -> (Terms, collected)`,
            one reverse pass; `scale` is d loss / d total, by default one over the batch's weight.
        collectors: by name, what is collected.
        alone: the name of what is returned alone.
        collecting: from other collectors, the same `evaluate` with those; None where the gradient
            is not a collector's.
        adds_up: whether the terms of a loss, each alone, collect what adds up to that of all.
        drops: whether parts of a batch may be left out, with their weight.
    """

    objective: Objective
    evaluate: Evaluate
    collectors: Mapping[str, Collect]
    alone: str | None = None
    collecting: Callable[[Mapping[str, Collect]], Evaluate] | None = None
    adds_up: bool = True
    drops: bool = False

    def __call__(
        self, params: Params, batch: Batch, *, key: Array | None = None, training: bool = True
    ) -> tuple[Array, PyTree]:
        """The mean loss, and its gradient or what was collected."""
        self.objective.check(params, batch, key=key, training=training)
        terms, collected = self.evaluate(params, _on_device(batch), key=key, training=training)
        return terms.mean(), collected if self.alone is None else collected[self.alone]


def value_and_collect(objective: Objective, **collectors: Collect) -> Evaluation:
    """The loss, and by name whatever is to be collected, in one hand-written reverse pass.

    Args:
        objective: what to differentiate.
        collectors: functions `visit -> (collected, dx)`, such as `bh.gradients`.

    Example:
        >>> import backhand as bh
        >>> loss = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> both = bh.value_and_collect(loss, gradients=bh.gradients, norms=bh.square_norms)
        >>> value, collected = both(params, batch)
        >>> collected["norms"]["w"].shape
        (4,)
    """
    check_objective(objective)
    for name, collector in collectors.items():
        if not callable(collector):
            raise TypeError(f"{name}: a collector is a function of a visit, got {collector!r}")

    def collecting(collectors: Mapping[str, Collect]) -> Evaluate:
        def evaluate(
            params: Params,
            batch: Batch,
            *,
            scale: PyTree = None,
            key: Array | None = None,
            training: bool = True,
        ) -> tuple[Terms, dict[str, PyTree]]:
            given = {"key": key, "training": training}
            terms, residuals = objective.forward(params, batch, **given)
            dtotal = jax.tree.map(inverse, terms.weight) if scale is None else scale
            collected = objective.backward(
                params, residuals, dtotal, batch, together(collectors), **given
            )
            return terms, {name: apart(collected, name) for name in collectors}

        return evaluate

    steered = collecting if objective.untouched else None
    return Evaluation(objective, collecting(collectors), collectors, collecting=steered)


def value_and_grad(
    objective: Objective, *, gradients: Literal["manual", "automatic"] = "manual"
) -> Evaluation:
    """The loss and its gradient, as `jax.value_and_grad` gives them, by the hand-written reverse.

    Args:
        objective: what to differentiate.
        gradients: "automatic" for `jax.grad` behind the same signature, to compare or accumulate.

    Returns:
        `(params, batch, *, key=None, training=True) -> (loss, grads)`.

    Raises:
        ValueError: for another kind of gradients.
    """
    check_objective(objective)
    if gradients not in ("manual", "automatic"):
        raise ValueError(f"gradients must be 'manual' or 'automatic', got {gradients!r}")
    if gradients == "manual":
        manual = value_and_collect(objective, gradients=default_gradients)
        return dataclasses.replace(manual, alone="gradients")

    def evaluate(
        params: Params,
        batch: Batch,
        *,
        scale: PyTree = None,
        key: Array | None = None,
        training: bool = True,
    ) -> tuple[Terms, dict[str, PyTree]]:
        def loss(params: Params) -> tuple[Array, Terms]:
            terms, _ = objective.forward(params, batch, key=key, training=training)
            dtotal = jax.tree.map(inverse, terms.weight) if scale is None else scale
            parts = jax.tree.map(jnp.multiply, terms.total, jax.lax.stop_gradient(dtotal))
            return _sum(parts), terms

        grads, terms = jax.grad(loss, has_aux=True, allow_int=True)(params)
        own = jax.tree.map(lambda p, g: g if is_floating(p) else None, params, grads)
        return terms, {"gradients": own}

    return Evaluation(objective, evaluate, {"gradients": default_gradients}, "gradients")


def grad(objective: Objective) -> Callable[..., PyTree]:
    """The gradient of the loss, as `jax.grad` gives it, by the hand-written reverse."""
    evaluation = value_and_grad(objective)

    def gradient(
        params: Params, batch: Batch, *, key: Array | None = None, training: bool = True
    ) -> PyTree:
        return evaluation(params, batch, key=key, training=training)[1]

    return gradient


def _sum(terms: PyTree) -> Array:
    """The terms of a loss, added up."""
    return functools.reduce(operator.add, jax.tree.leaves(terms))


def _on_device(batch: Batch) -> dict[str, PyTree]:
    """The batch with every leaf a jax array."""
    return {name: jax.tree.map(jnp.asarray, value) for name, value in batch.items()}
