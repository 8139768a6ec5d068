"""Everything that a training run carries from step to step."""

import dataclasses
import inspect
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from backhand.arrays import is_floating, number, upcast
from backhand.contributions import Leaf, is_running
from backhand.protocol import check_key, listed
from backhand.visit import Params, PyTree

LARGEST_SCALE = 2.0**24
"""Of a loss: the largest number below which float32 still counts in ones."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Average:
    """An exponential moving average of parameters; each step keeps the share `decay` of it.

    In at least float32: in bfloat16 a step of 1 - decay would be rounded away. Integers have no
    average and are those of the last step.
    """

    params: Params
    decay: float = dataclasses.field(metadata={"static": True})

    def updated(self, params: Params) -> "Average":
        """The average after a step that ended in `params`."""
        keep = self.decay

        def moved(old: Array, p: Array) -> Array:
            # Not keep * old + (1 - keep) * p, which by its roundings moves what does not change.
            return old + (1 - keep) * (p.astype(old.dtype) - old) if is_floating(p) else p

        return Average(jax.tree.map(moved, self.params, params), keep)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """A factor on every error of a reverse pass in float16, taken out of the gradient again.

    Halved when a step overflows, doubled after `patience` steps that do not.

    References:
        Micikevicius et al., "Mixed precision training", 2017.
    """

    scale: Leaf
    good_steps: Leaf
    patience: int = dataclasses.field(default=2000, metadata={"static": True})

    def updated(self, finite: Array) -> "LossScale":
        """The scale after a step whose gradient was finite, or not."""
        good = jnp.where(finite, self.good_steps + 1, 0)
        grow = good >= self.patience
        scale = jnp.where(finite, jnp.where(grow, 2 * self.scale, self.scale), self.scale / 2)
        return LossScale(jnp.clip(scale, 1, LARGEST_SCALE), jnp.where(grow, 0, good), self.patience)


class TrainState(NamedTuple):
    """A pytree: what `train_step` takes and gives.

    Attributes:
        step: how many batches were seen, int32 ().
        params: the parameters, running statistics included.
        opt_state: the optimizer's.
        key: the key of the run; step n uses `jax.random.fold_in(key, n)`. None without one.
        average: the moving average of the parameters; None without one.
        loss_scale: the loss scale; None without one.
    """

    step: Array
    params: Params
    opt_state: PyTree
    key: Array | None
    average: Average | None = None
    loss_scale: LossScale | None = None


def train_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    key: Array | None = None,
    frozen: Sequence[str] = (),
    ema_decay: float | None = None,
    loss_scale: float | None = None,
) -> TrainState:
    """The state before the first step, on copies of `params` and `key`: steps donate their state.

    Args:
        params: as `objective.init` gives them.
        optimizer: any Optax update rule.
        key: for models that use one while training.
        frozen: the step's, paths of parameters that are not trained: no optimizer state for them.
        ema_decay: in [0, 1), keeps a moving average of the parameters.
        loss_scale: for float16 activations, the scale to begin with, such as 2.0**15. It is halved
            by a step that overflows, and doubled after 2000 that do not.

    Raises:
        TypeError: if the optimizer is not an `optax.GradientTransformation`, or a setting no
            number.
        ValueError: for a decay outside [0, 1), a scale outside [1, 2**24], or a path that matches
            nothing.
    """
    if ema_decay is not None and not 0 <= number("ema_decay", ema_decay) < 1:
        raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}")
    if loss_scale is not None and not 1 <= number("loss_scale", loss_scale) <= LARGEST_SCALE:
        raise ValueError(f"loss_scale must lie in [1, 2**24], got {loss_scale}")
    if key is not None:
        check_key(key)
    params, key = jax.tree.map(jnp.copy, (params, key))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # Some rules keep the parameters themselves; a buffer can be donated only once.
        opt_state=jax.tree.map(jnp.copy, learning(optimizer, params, frozen).init(params)),
        key=key,
        average=None if ema_decay is None else Average(jax.tree.map(_averaged, params), ema_decay),
        loss_scale=None
        if loss_scale is None
        else LossScale(jnp.float32(loss_scale), jnp.zeros((), jnp.int32)),
    )


def learning(
    optimizer: optax.GradientTransformation, params: Params, frozen: Sequence[str] = ()
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, kept from frozen parameters, running statistics and integers.

    Weight decay would shrink them. Of what a step offers a rule (`value`, `grad`, `value_fn`) it is
    given what it takes.

    Raises:
        TypeError: if it is not an `optax.GradientTransformation`.
        ValueError: for a path that matches no parameter.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            "the optimizer must be an optax.GradientTransformation, such as optax.adamw(1e-3); got "
            f"{optimizer!r}"
        )
    rule = _given_what_it_takes(optax.with_extra_args_support(optimizer))
    mask = learned(params, frozen)
    if all(jax.tree.leaves(mask)):
        return rule
    return optax.masked(rule, mask, mask_compatible_extra_args=True)


def learned(params: Params, frozen: Sequence[str] = ()) -> PyTree:
    """True for each parameter that is trained.

    That is one of floating point that is no running statistic and at no frozen path.

    Args:
        params: parameters.
        frozen: paths, their keys joined by "/", with `*` for any characters: "tokens/*".

    Raises:
        ValueError: for a path that matches no parameter.
    """
    learnable = jax.tree.map(_is_learned, params, is_leaf=is_running)
    return jax.tree.map(lambda own, fixed: own and not fixed, learnable, at(params, frozen))


def check_paths(frozen: Sequence[str]) -> None:
    """Refuses a text where a list of them is meant.

    Raises:
        ValueError: saying what to write.
    """
    if isinstance(frozen, str):
        raise ValueError(f"frozen takes a list of paths, got the text {frozen!r}: [{frozen!r}]")


def at(params: Params, frozen: Sequence[str]) -> PyTree:
    """True for each parameter at one of the paths, running statistics among them.

    Raises:
        ValueError: for a path that matches no parameter.
    """
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    check_paths(frozen)
    for pattern in frozen:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"frozen: no parameter is at {pattern!r}; there are {listed(paths)}")
    fixed = [any(fnmatchcase(path, pattern) for pattern in frozen) for path in paths]
    return jax.tree.unflatten(jax.tree.structure(params), fixed)


def _is_learned(leaf: Any) -> Any:
    """False throughout a running statistic, True for a parameter of floating point."""
    return jax.tree.map(lambda _: False, leaf) if is_running(leaf) else is_floating(leaf)


def _averaged(p: Array) -> Array:
    """Where the average of a parameter begins, a buffer of its own."""
    return jnp.copy(upcast(p) if is_floating(p) else p)


def _given_what_it_takes(
    rule: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The rule, spared the extra arguments that its signature does not have."""
    takes = inspect.signature(rule.update).parameters
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return rule

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        own = {name: value for name, value in extra.items() if name in takes}
        return rule.update(updates, state, params, **own)

    return optax.GradientTransformationExtraArgs(rule.init, update)
