"""One step of training: forward, loss, backward, update."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import DTypeLike

from backhand.accumulate import accumulate as in_micro_batches
from backhand.accumulate import all_finite, rescaled
from backhand.arrays import inverse
from backhand.clipping import value_and_clipped_grad
from backhand.collectors import merge_statistics, statistics
from backhand.gradients import (
    Batch,
    Evaluation,
    Objective,
    Terms,
    value_and_collect,
    value_and_grad,
)
from backhand.training.state import TrainState, at, learned, learning
from backhand.visit import Params, PyTree
from backhand.visit import gradients as gradient

_COLLECTORS = {"gradients": gradient, "statistics": statistics}


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """A jitted step `(state, batch) -> (state, metrics)`, made by `train_step`.

    Args:
        check: `(state, batch) -> None`, run on the host; raises before anything compiles.
        jitted: the step itself, whose `lower` gives XLA's memory and cost analyses.
    """

    check: Callable[[TrainState, Batch], None]
    jitted: Any

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """The state after the step, and its metrics; donates the state.

        Raises:
            TypeError: for what is not a `TrainState`.
            ValueError: for a state that an earlier step used up, and as `train_step` says.
        """
        if not isinstance(state, TrainState):
            raise TypeError(
                "a step takes a state, made by bh.train_state(params, optimizer); got "
                f"{type(state).__name__}"
            )
        if getattr(state.step, "is_deleted", bool)():
            raise ValueError(
                "this state was used up by an earlier step: go on with the one that came back, as "
                "in state, metrics = step(state, batch)"
            )
        self.check(state, batch)
        return self.jitted(state, dict(batch))


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    gradients: Literal["manual", "automatic"] = "manual",
    clip_norm: float | None = None,
    clip_layer_norm: float | None = None,
    clip_example_norm: float | None = None,
    frozen: Sequence[str] = (),
    dtype: DTypeLike | None = None,
    nonfinite: Literal["keep", "drop", "skip"] = "keep",
    steps_per_call: int = 1,
) -> TrainStep:
    """A jitted step `(state, batch) -> (state, metrics)`.

    The state is donated: use the one that comes back. Compiled once for each shape of batch, and
    dispatched without waiting for the device.

    Args:
        objective: what to minimize.
        optimizer: any Optax update rule, the one that the state was made with. Rules that ask for
            them get the loss (`value`), the gradient (`grad`) and the objective (`value_fn`).
        accumulate: the number of micro-batches that a batch is computed in; see `bh.accumulate`.
        gradients: "manual" for the hand-written reverse pass, "automatic" for `jax.grad`.
        clip_norm: the largest norm of the whole gradient, after accumulation.
        clip_layer_norm: likewise of each layer's gradient.
        clip_example_norm: likewise of each example's; see `bh.value_and_clipped_grad`.
        frozen: paths of parameters that are not trained, such as "tokens/*"; see `learned`.
        dtype: of the activations: floating-point inputs are cast to it; parameters, sums and
            losses stay float32. float16 needs a state with a loss scale.
        nonfinite: what happens at a NaN or Inf in a loss or gradient. "drop" leaves out the
            micro-batches that have one, "skip" the whole update; both count them in the metrics.
            With a loss scale an update that overflows is always skipped, and what is dropped
            lowers the scale.
        steps_per_call: S; above 1 the step takes S batches stacked on a leading axis, and gives S
            of each metric. Small models train several times as fast so.

    Returns:
        The step. Its metrics are device scalars: "loss", "gradient_norm" before any clipping of
        it, "empty", how many terms of the loss had weights that sum to zero, and the objective's.
        Nothing seen is a loss of 0 with a gradient of 0, and the optimizer's step for it.

    Raises:
        TypeError: if the optimizer is not an Optax update rule.
        ValueError: for a setting outside what is stated above or, when called, a batch that the
            objective refuses or an optimizer state of other parameters; before anything compiles.

    Example:
        >>> import backhand as bh, jax.numpy as jnp, optax
        >>> loss = bh.objective(bh.dense(1), bh.losses.mean_squared_error)
        >>> batch = {"inputs": jnp.ones((4, 3)), "targets": jnp.zeros((4, 1))}
        >>> params = loss.init(jax.random.key(0), batch)
        >>> state = bh.train_state(params, optax.adam(1e-3))
        >>> step = bh.train_step(loss, optax.adam(1e-3))
        >>> state, metrics = step(state, batch)
        >>> int(state.step), sorted(metrics)
        (1, ['empty', 'gradient_norm', 'loss'])
    """
    learning(optimizer, ())
    for name, norm in (("clip_norm", clip_norm), ("clip_layer_norm", clip_layer_norm)):
        if norm is not None and not norm > 0:
            raise ValueError(f"{name} must be above 0, got {norm}")
    if nonfinite not in ("keep", "drop", "skip"):
        raise ValueError(f"nonfinite must be 'keep', 'drop' or 'skip', got {nonfinite!r}")
    if steps_per_call < 1:
        raise ValueError(f"steps_per_call must be at least 1, got {steps_per_call}")
    evaluate = in_micro_batches(
        _evaluation(objective, gradients, clip_example_norm, lambda p: learned(p, frozen)),
        accumulate,
        nonfinite="drop" if nonfinite == "drop" else "keep",
    ).evaluate

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        batch = dict(batch) if dtype is None else {**batch, "inputs": _cast(batch["inputs"], dtype)}
        key = None if state.key is None else jax.random.fold_in(state.key, state.step)
        loss, grads, seen, metrics = reverse(state, batch, key)
        rules = learning(optimizer, state.params, frozen)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        if clip_layer_norm is not None:
            grads = _by_layer(grads, clip_layer_norm)
        if clip_norm is not None:
            grads = _scaled(grads, clip_norm / jnp.maximum(optax.tree.norm(grads), clip_norm))
        with jax.numpy_dtype_promotion("standard"):  # Optax's rules mix dtypes
            updates, opt_state = rules.update(
                grads,
                state.opt_state,
                state.params,
                value=loss,
                grad=grads,
                value_fn=lambda params: objective(params, batch, key=key),
            )
            params = merge_statistics(optax.apply_updates(state.params, updates), seen)
        params = jax.tree.map(
            lambda old, p, fixed: old if fixed else p, state.params, params, at(params, frozen)
        )
        new = state._replace(params=params, opt_state=opt_state)
        if state.average is not None:
            new = new._replace(average=state.average.updated(params))
        if nonfinite == "skip" or state.loss_scale is not None:
            fine = all_finite((loss, metrics["gradient_norm"], seen))
            kept = ("params", "opt_state", "average")
            new = new._replace(
                **{n: _where(fine, getattr(new, n), getattr(state, n)) for n in kept}
            )
            metrics["skipped"] = 1 - fine.astype(jnp.int32)
            if state.loss_scale is not None:
                fits = fine & (metrics.get("dropped", 0) == 0)
                new = new._replace(loss_scale=state.loss_scale.updated(fits))
        return new._replace(step=state.step + 1), metrics

    def reverse(
        state: TrainState, batch: dict[str, PyTree], key: Array | None
    ) -> tuple[Array, PyTree, PyTree, dict[str, Array]]:
        """The loss, its gradient, what running statistics saw, and the metrics."""
        scale = None
        if state.loss_scale is not None:  # the weight is a function of the batch: the rest is dead
            terms, _ = objective.forward(state.params, batch, key=key, training=True)
            factor = state.loss_scale.scale
            scale = jax.tree.map(lambda w: factor.astype(w.dtype) * inverse(w), terms.weight)
        terms, collected = evaluate(state.params, batch, scale=scale, key=key)
        metrics = terms.measured()
        nothing = [w == 0 for w in jax.tree.leaves(terms.weight)]
        metrics["empty"] = jnp.sum(jnp.stack(nothing), dtype=jnp.int32)
        if state.loss_scale is not None:
            metrics["loss_scale"] = state.loss_scale.scale
            if nonfinite == "drop":  # the weight is that of what was kept
                collected = rescaled(_COLLECTORS, collected, scale, terms.weight)
            else:
                grads = _scaled(collected["gradients"], 1 / state.loss_scale.scale)
                collected = {**collected, "gradients": grads}
        grads = collected["gradients"]
        return terms.mean(), grads, collected["statistics"], {"loss": terms.mean(), **metrics}

    def runs(state: TrainState, batches: Batch) -> tuple[TrainState, dict[str, Array]]:
        return lax.scan(run, state, dict(batches))

    compiled = jax.jit(run if steps_per_call == 1 else runs, donate_argnums=0)
    known: set[Any] = set()

    def check(state: TrainState, batch: Batch) -> None:
        leaves, structure = jax.tree.flatten((state, batch))
        shapes = (structure, *((np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves))
        on_device = all(isinstance(leaf, Array) for leaf in jax.tree.leaves(batch))
        if shapes in known and on_device:  # only values on the host are checked at every call
            return
        one = batch if steps_per_call == 1 else _unstacked(batch, steps_per_call)
        objective.check(state.params, one, key=state.key, training=True)
        if shapes not in known:
            _check_state(state, optimizer, frozen, dtype)
            known.add(shapes)

    return TrainStep(check, compiled)


def _evaluation(
    objective: Objective,
    gradients: Literal["manual", "automatic"],
    clip_example_norm: float | None,
    mask: Callable[[Params], PyTree],
) -> Evaluation:
    """Gradients of what is learned, and running statistics, in one pass either way.

    The others' gradients are left out before anything reads them, so the compiler drops their work.
    Beside automatic gradients the statistics come from the hand-written reverse: they do not depend
    on the errors, so the compiler drops the rest of it.
    """
    automatic = value_and_grad(objective, gradients=gradients)
    if clip_example_norm is not None:
        if gradients != "manual":
            raise ValueError("clip_example_norm needs the hand-written reverse: gradients='manual'")
        return value_and_clipped_grad(objective, clip_example_norm, mask=mask)
    manual = value_and_collect(objective, **_COLLECTORS)
    forward = value_and_collect(objective, statistics=statistics)

    def evaluate(params: Params, batch: Batch, **given: Any) -> tuple[Terms, dict[str, PyTree]]:
        if gradients == "manual":
            terms, collected = manual.evaluate(params, batch, **given)
        else:
            terms, collected = automatic.evaluate(params, batch, **given)
            collected |= forward.evaluate(params, batch, **given)[1]
        grads = jax.tree.map(
            lambda g, learns: g if learns else jnp.zeros_like(g),
            collected["gradients"],
            mask(params),
        )
        return terms, {**collected, "gradients": grads}

    return dataclasses.replace(manual, evaluate=evaluate)


def _check_state(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    frozen: Sequence[str],
    dtype: DTypeLike | None,
) -> None:
    """Refuses a state that this step cannot continue.

    Raises:
        ValueError: saying why.
    """
    expected = jax.eval_shape(learning(optimizer, state.params, frozen).init, state.params)
    got = jax.eval_shape(lambda: state.opt_state)
    structures: list[Any] = [jax.tree.structure(expected), jax.tree.structure(got)]
    same = structures[0] == structures[1]
    if not same or any(
        a.shape != b.shape
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True)
    ):
        raise ValueError(
            "the optimizer state is not one of these parameters and this optimizer; make it with "
            "bh.train_state(params, optimizer), with the optimizer and the `frozen` of the "
            "step"
        )
    if dtype is not None and jnp.dtype(dtype) == jnp.float16 and state.loss_scale is None:
        raise ValueError("float16 needs a loss scale: bh.train_state(..., loss_scale=2.0**15)")


def _unstacked(batches: PyTree, steps: int) -> PyTree:
    """S stacked batches as one long one, to check.

    Raises:
        ValueError: if they are not S.
    """

    def flat(leaf: Any) -> Any:
        shape = np.shape(leaf)
        if len(shape) < 2 or shape[0] != steps:
            raise ValueError(
                f"{steps} steps in a call need arrays of shape ({steps}, B, ...), got {shape}"
            )
        return leaf.reshape(shape[0] * shape[1], *shape[2:])

    return jax.tree.map(flat, dict(batches) if isinstance(batches, Mapping) else batches)


def _cast(inputs: PyTree, dtype: DTypeLike) -> PyTree:
    """Floating-point inputs in the dtype of the activations."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, inputs
    )


def _where(condition: Array, a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def _scaled(grads: PyTree, factor: Array) -> PyTree:
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


def _by_layer(grads: PyTree, max_norm: float) -> PyTree:
    """Each layer's gradient clipped to a norm; a layer is the parameters of one dict or tuple."""
    structure: Any
    paths, structure = jax.tree_util.tree_flatten_with_path(grads)
    layers: dict[Any, list[Array]] = {}
    for path, leaf in paths:
        layers.setdefault(path[:-1], []).append(leaf)
    norms = {layer: optax.tree.norm(leaves) for layer, leaves in layers.items()}
    factors = {layer: max_norm / jnp.maximum(norm, max_norm) for layer, norm in norms.items()}
    return structure.unflatten([_scaled(leaf, factors[path[:-1]]) for path, leaf in paths])
