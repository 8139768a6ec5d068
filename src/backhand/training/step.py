"""One step of training: forward, loss, backward, update."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import DTypeLike

from backhand.arrays import is_floating, need_floating_dtype, number, whole_number
from backhand.gradients import Batch, Objective
from backhand.recent import Recent
from backhand.training.clip import by_layer, by_norm, layers_of, norm
from backhand.training.reverse import as_function, reverse_pass
from backhand.training.state import TrainState, check_paths, learning
from backhand.training.update import unless_it_breaks, updating
from backhand.visit import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """A jitted step `(state, batch) -> (state, metrics)`, made by `train_step`.

    Args:
        check: `(state, batch) -> None`, run on the host; raises before anything compiles.
        jitted: the step itself, whose `lower` gives XLA's memory and cost analyses.
    """

    check: Callable[[TrainState, Batch], None]
    jitted: Any

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, PyTree]]:
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
        traced = isinstance(state.step, jax.core.Tracer)
        if not traced and getattr(state.step, "is_deleted", bool)():
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

    The state is donated: use the one that comes back. Compiled once for each shape of batch and
    place of its arrays, and dispatched without waiting for the device. Put the state where the
    batches are put: one that was left where it was made comes back where they are, which the second
    step is compiled for again.

    Args:
        objective: what to minimize.
        optimizer: any Optax update rule, the one that the state was made with. Rules that ask for
            them get the loss (`value`), the gradient (`grad`) and, as a function of the parameters
            that are trained, the loss of the batch (`value_fn`): as the step computes it, in the
            same micro-batches with the same keys, and infinite where more of them would be left
            out. With "drop" each evaluation is a whole reverse pass.
        accumulate: the number of micro-batches that a batch is computed in; see `bh.accumulate`.
        gradients: "manual" for the hand-written reverse pass, "automatic" for `jax.grad`.
        clip_norm: the largest norm of the whole gradient, after accumulation.
        clip_layer_norm: likewise of each layer's gradient: a layer is what `bh.layer` makes, such
            as `bh.dense` and `bh.multi_head_attention`; repeated ones are clipped one by one.
        clip_example_norm: likewise of each example's, times its weight; see
            `bh.value_and_clipped_grad`.
        frozen: paths of parameters that are not trained, such as "tokens/*"; see `learned`. Layers
            that are to be as in evaluation, batch norm by its running statistics, are in `freeze`.
        dtype: of the activations: floating-point inputs are cast to it; parameters, sums and
            losses stay float32. In a model of ids the embedding decides, by its `dtype`, or
            `bh.cast` after it. float16 needs a state with a loss scale.
        nonfinite: what happens at a NaN or Inf in a loss or gradient. "drop" leaves out the
            micro-batches that have one, "skip" the whole update; both count them in the metrics.
            Either way, and always with a loss scale, an update after which a number of the state
            would no longer be finite is skipped, and what is skipped or dropped lowers the scale.
        steps_per_call: S; above 1 the step takes S batches stacked on a leading axis, and gives S
            of each metric. Small models train several times as fast so.

    Returns:
        The step. Its metrics are device scalars: "loss", "gradient_norm" before any clipping of
        it, "empty", how many terms of the loss had weights that sum to zero, and the objective's,
        among them states to hand to the next step (`bh.metrics.state`).
        Nothing seen is a loss of 0 with a gradient of 0, and the optimizer's step for it.

    Raises:
        TypeError: if the optimizer is not an Optax update rule.
        ValueError: for a setting outside what is stated above or, when called, a batch that the
            objective refuses, an optimizer state or an average of other parameters, a dtype that
            nothing would be computed in, or an objective's metric with a name in
            `backhand.metrics.RESERVED`; before anything compiles. Values are looked at where they
            are on the host: on the device, a negative weight makes loss and gradient NaN, an
            impossible label the loss, and adds nothing to the gradient.

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
    for name, most in (("clip_norm", clip_norm), ("clip_layer_norm", clip_layer_norm)):
        if most is not None and not number(name, most) > 0:
            raise ValueError(f"{name} must be above 0, got {most}")
    if nonfinite not in ("keep", "drop", "skip"):
        raise ValueError(f"nonfinite must be 'keep', 'drop' or 'skip', got {nonfinite!r}")
    if whole_number("steps_per_call", steps_per_call) < 1:
        raise ValueError(f"steps_per_call must be at least 1, got {steps_per_call}")
    if dtype is not None:
        need_floating_dtype(dtype)
    check_paths(frozen)
    passes = functools.partial(
        reverse_pass,
        objective,
        way=gradients,
        micro_batches=accumulate,
        frozen=frozen,
        drop=nonfinite == "drop",
    )
    reverse, unclipped = (passes(clip_example_norm=c) for c in (clip_example_norm, None))

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, PyTree]]:
        batch, params, scale = _cast(batch, dtype), state.params, state.loss_scale
        key = None if state.key is None else jax.random.fold_in(state.key, state.step)
        factor = None if scale is None else scale.scale
        found = reverse(params, batch, key, factor)
        grads, size = found.gradients, norm(found.gradients)
        metrics = {**found.metrics, "gradient_norm": size}
        if clip_layer_norm is not None:
            grads = by_layer(grads, layers_of(objective, params, batch, key), clip_layer_norm)
        if clip_norm is not None:
            grads = by_norm(grads, clip_norm)
        loss_of = as_function(unclipped, batch, key, factor, found.dropped)
        update = updating(optimizer, frozen, found.loss, found.statistics, loss_of)
        if nonfinite == "keep" and scale is None:
            state = update(state, grads)
        else:
            state, fine = unless_it_breaks(update, state, grads, found.loss, size)
            metrics["skipped"] = 1 - fine.astype(jnp.int32)
            if scale is not None:
                metrics["loss_scale"] = scale.scale
                state = state._replace(loss_scale=scale.updated(fine & (found.dropped == 0)))
        return state._replace(step=state.step + 1), metrics

    def runs(state: TrainState, batches: Batch) -> tuple[TrainState, dict[str, PyTree]]:
        return lax.scan(run, state, dict(batches))

    compiled = jax.jit(run if steps_per_call == 1 else runs, donate_argnums=0)
    known: Recent[bool] = Recent()

    def check(state: TrainState, batch: Batch) -> None:
        leaves, structure = jax.tree.flatten((state, batch))
        shapes = (structure, *((np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves))
        on_device = all(isinstance(leaf, Array) for leaf in jax.tree.leaves(batch))
        fits = known.find(shapes)
        if fits and on_device:  # only values on the host are checked at every call
            return
        one = batch if steps_per_call == 1 else _unstacked(batch, steps_per_call)
        objective.check(state.params, one, key=state.key, training=True)
        if not fits:
            _check_state(state, optimizer, frozen)
            _check_dtype(objective, state, one, dtype)
            known.keep(shapes, True)

    return TrainStep(check, compiled)


def _check_state(
    state: TrainState, optimizer: optax.GradientTransformation, frozen: Sequence[str]
) -> None:
    """Refuses a state that this step cannot continue.

    Raises:
        ValueError: saying why.
    """
    expected = jax.eval_shape(learning(optimizer, state.params, frozen).init, state.params)
    got = jax.eval_shape(lambda: state.opt_state)
    trees: list[Any] = [jax.tree.flatten(tree) for tree in (expected, got)]
    described = [([(x.shape, x.dtype) for x in leaves], tree) for leaves, tree in trees]
    if described[0] != described[1]:
        raise ValueError(
            "the optimizer state is not one of these parameters and this optimizer; make it with "
            "bh.train_state(params, optimizer), with the optimizer and the `frozen` of the "
            "step"
        )
    if state.average is not None and _shapes(state.average.params) != _shapes(state.params):
        raise ValueError(
            "the average is not one of these parameters; make it with "
            "bh.train_state(params, optimizer, ema_decay=...)"
        )


def _shapes(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    """The structure of a tree, and the shapes of its leaves."""
    return jax.tree.structure(tree), [np.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _check_dtype(
    objective: Objective, state: TrainState, batch: Batch, dtype: DTypeLike | None
) -> None:
    """Refuses a dtype that would overflow, or that nothing would be computed in.

    Raises:
        ValueError: saying what to do.
    """
    if dtype is None:
        return
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float16 and state.loss_scale is None:
        raise ValueError("float16 needs a loss scale: bh.train_state(..., loss_scale=2.0**15)")
    arrays = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, dict(batch)))
    if any(is_floating(x) for x in jax.tree.leaves(arrays.get("inputs"))):
        return
    run = functools.partial(objective.forward, key=state.key, training=True)
    _, residuals = jax.eval_shape(run, state.params, arrays)
    if all(x.dtype != dtype for x in jax.tree.leaves(residuals)):
        raise ValueError(
            f"dtype={dtype.name} is that of floating-point inputs, which this batch has not, and "
            f"nothing in the model computes in it: give it to the embedding, as in "
            f"bh.embedding(vocabulary, features, dtype=jnp.{dtype.name}), or put "
            f"bh.cast(jnp.{dtype.name}) after it"
        )


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


def _cast(batch: Batch, dtype: DTypeLike | None) -> dict[str, PyTree]:
    """The batch, its floating-point inputs in the dtype of the activations."""
    if dtype is None or "inputs" not in batch:
        return dict(batch)
    inputs = jax.tree.map(lambda x: x.astype(dtype) if is_floating(x) else x, batch["inputs"])
    return {**batch, "inputs": inputs}
