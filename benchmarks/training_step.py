"""What a step of training costs: many in a call, frozen parameters, updates on the way back."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import backhand as bh
from benchmarks.accumulation_models import Batch, classifier, masked, mlp
from benchmarks.measure import Result, in_turns, memory_ratio, temporary


def many_steps(samples: int, steps: int = 50) -> Iterator[Result]:
    """Steps in one call, against as many calls."""
    objective, optimizer = mlp(64, 10), optax.adamw(1e-3)
    batch = masked(32, 64, 10)
    batches = jax.tree.map(lambda x: jnp.stack([x] * steps), batch)
    params = objective.init(jax.random.key(0), batch)

    def runner(step: Callable[..., Any], data: Batch, calls: int) -> Callable[[], Any]:
        state = bh.train_state(params, optimizer)

        def run() -> Any:
            nonlocal state
            for _ in range(calls):
                state, metrics = step(state, data)
            return state.step, metrics

        run()
        return run

    together = bh.train_step(objective, optimizer, steps_per_call=steps)
    apart = bh.train_step(objective, optimizer)

    @functools.partial(jax.jit, donate_argnums=0)
    def plain(state: Any, batch: Batch) -> tuple[Any, Any]:
        loss, grads = jax.value_and_grad(objective)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state), {"loss": loss}

    def memory(jitted: Any, data: Batch) -> int:
        return temporary(jitted.lower(bh.train_state(params, optimizer), data).compile())

    place, own = "64-64-10, batch 32, AdamW", memory(together.jitted, batches)
    once = runner(together, batches, 1)
    for against, other in ((f"{steps} calls", apart), (f"{steps} calls of plain JAX", plain)):
        timing = in_turns(once, runner(other, batch, steps), samples=samples)
        used = own, memory(plain if other is plain else apart.jitted, batch)
        megabytes = used[0] / 1e6, used[1] / 1e6
        name = f"{steps} steps in one call"
        yield Result(name, place, against, *timing, megabytes, memory_ratio(*used))


def updates(samples: int) -> Iterator[Result]:
    """Updating parameters while going back, against a gradient followed by its update."""
    layer = bh.chain(bh.dense(512), bh.relu())
    batch = masked(32, 512, 10)

    def descend(params: Any, grads: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

    new = bh.Collector(lambda visit: descend(visit.params, visit.dparams), degree=1)
    for name, body in (("unrolled", [layer] * 8), ("by repeat", [bh.repeat(layer, 8)])):
        objective = classifier(*body, bh.dense(10))
        params = objective.init(jax.random.key(0), batch)
        at_once, evaluate = bh.value_and_collect(objective, new=new), bh.value_and_grad(objective)

        def on_the_way(params: Any, batch: Batch, run: Any = at_once) -> Any:
            return run(params, batch)[1]["new"]

        def afterwards(params: Any, batch: Batch, run: Any = evaluate) -> Any:
            return descend(params, run(params, batch)[1])

        sides = [
            jax.jit(side, donate_argnums=0).lower(params, batch).compile()
            for side in (on_the_way, afterwards)
        ]
        mine, theirs = (temporary(side) for side in sides)
        timing = in_turns(*(repeated(side, params, batch) for side in sides), samples=samples)
        place = f"8 x 512-512 {name}, batch 32"
        what = "descent on the way back", place, "descent afterwards"
        megabytes = mine / 1e6, theirs / 1e6
        yield Result(*what, *timing, megabytes, memory_ratio(mine, theirs))


def repeated(step: Callable[..., Any], params: Any, batch: Batch) -> Callable[[], Any]:
    """A call that continues from the parameters of the call before, which are donated."""
    params = jax.tree.map(jnp.copy, params)

    def run() -> Any:
        nonlocal params
        params = step(params, batch)
        return params

    return run


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Operations of a step by XLA's count, with some parameters frozen and with none.

    Attributes:
        setting: the model.
        frozen: the paths that are.
        gradients: "manual" or "automatic".
        flops: with and without.
        ratio: with / without.
    """

    setting: str
    frozen: str
    gradients: str
    flops: tuple[float, float]
    ratio: float


def frozen_flops() -> Iterator[Frozen]:
    """What is left of a step's operations where parameters are frozen by path."""
    objective, optimizer = mlp(1024, 1024, 10), optax.sgd(0.1)
    batch = masked(256, 784, 10)
    params = objective.init(jax.random.key(0), batch)

    def flops(frozen: list[str], gradients: Any) -> float:
        state = bh.train_state(params, optimizer, frozen=frozen)
        step = bh.train_step(objective, optimizer, frozen=frozen, gradients=gradients)
        compiled = step.jitted.lower(state, batch).compile()
        return compiled.cost_analysis()["flops"]

    for gradients in ("manual", "automatic"):
        whole = flops([], gradients)
        for paths in (["0/*"], ["0/*", "2/*"]):
            left = flops(paths, gradients)
            name = "784-1024-1024-10, batch 256"
            yield Frozen(name, ", ".join(paths), gradients, (left, whole), left / whole)


def frozen_table(rows: list[Frozen]) -> str:
    lines = ["| step | frozen | gradients | MFLOP | left |", "|---|---|---|---|---|"]
    for row in rows:
        left, whole = (1e-6 * count for count in row.flops)
        lines.append(
            f"| {row.setting} | {row.frozen} | {row.gradients} | {left:.0f} of {whole:.0f} "
            f"| **{row.ratio:.2f}** |"
        )
    return "\n".join(lines)
