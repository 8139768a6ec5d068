"""What a gradient must also be: of the right shape, pure, the same under jit, honest on NaN."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backhand.audit.callbacks import callbacks
from backhand.audit.dtypes import programs
from backhand.audit.gradient import Rounding, judge, spared
from backhand.audit.inputs import first_sentence, is_refusal, same, two_calls
from backhand.audit.result import Finding
from backhand.audit.runs import COTANGENTS, Runs, compiled
from backhand.audit.structure import structure
from backhand.audit.subject import Leaves

MOST_EAGER = 50
"""Different operations that are worth running one by one: each compiles on its own, in 20 to 40 ms.
A recurrent layer has 30 of them, a block of a transformer 56, a mixture of experts 127."""

SEEN = "which an audit runs many times: what it shows is of no gradient in particular"
HOST = "which runs on the host: what it gives must depend on its arguments alone"

WHOLE = frozenset({"jit", "pjit", "scan", "while", "cond"})
"""What is compiled as one program wherever it is called."""

MOST_LEAVES = 8
"""Of how many leaves one element is made NaN and Inf, one leaf at a time."""

Check = Callable[[Runs], "Iterator[Finding]"]


def properties(runs: Runs, right: bool = True) -> list[Finding]:
    """The findings of every property; one that cannot be tried is skipped and says why.

    `right` is whether the gradient is: the derivative of a wrong one is of no interest.
    """
    findings = []
    for name, check in CHECKS.items():
        if name == "purity":  # found first, before anything is compiled
            continue
        if name == "second derivative" and not right:
            findings.append(Finding(name, "", True, "the first is wrong", skipped=True))
            continue
        try:
            findings += list(check(runs))
        except Exception as error:
            why = f"it cannot be tried: {first_sentence(error)}"
            findings.append(Finding(name, "", True, why, skipped=True))
    return findings


def empty(runs: Runs) -> Iterator[Finding]:
    """Whether a batch without examples has a gradient where the reference has one.

    A rule may refuse it in words of its own, which is a note.
    """
    subject = runs.subject
    lengths = {leaf.shape[0] for leaf in runs.leaves if leaf.shape}
    own, rest = subject.shaped(jnp.float32)
    if len(lengths) != 1 or not runs.has_reference:
        why = "no first axis is common to the outputs" if runs.has_reference else "no reference"
        yield Finding("zero size", "", True, f"no empty batch can be made: {why}", skipped=True)
        return
    (batch,) = lengths
    why, message, refused = "", "", ""
    for cut in _without_examples(own, rest, batch):
        try:
            y = jax.eval_shape(subject.reference_value, *cut)
            dy = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in y]
            expected = jax.eval_shape(subject.automatic, *cut, dy)[1]
        except Exception as error:
            why = first_sentence(error)
            continue
        try:
            ours = jax.eval_shape(subject.pull, *cut, dy)[1]
        except Exception as error:
            what, said = "an empty batch, which the reference takes,", first_sentence(error)
            if is_refusal(error):
                refused = f"by design? {what} is refused: {said}"
            else:
                message = f"{what} fails: {said}"
            continue
        for path, a, b in zip(subject.paths, ours, expected, strict=True):
            if a.shape != b.shape:
                message = f"on an empty batch its cotangent has shape {a.shape}, not {b.shape}"
                yield Finding("zero size", path, False, message)
                return
        yield Finding("zero size", "", True, "an empty batch has a gradient of the right shapes")
        return
    passed = not message
    message = message or refused or f"the reference takes no empty batch: {why}"
    yield Finding("zero size", "", passed, message, skipped=passed)


def _without_examples(own: Leaves, rest: Leaves, batch: int) -> Iterator[list[Leaves]]:
    """The arrays without examples.

    A parameter may be as long as the batch by chance: then what has the most axes alone is cut, or
    one array alone.
    """
    every = [*own, *rest]
    long = [place for place, leaf in enumerate(every) if leaf.ndim and leaf.shape[0] == batch]
    most = max(leaf.ndim for leaf in every)
    deep = [place for place in long if every[place].ndim == most]
    for chosen in dict.fromkeys(
        (tuple(long), tuple(deep), *((place,) for place in reversed(long)))
    ):
        cut = [
            jax.ShapeDtypeStruct((0, *leaf.shape[1:]), leaf.dtype) if place in chosen else leaf
            for place, leaf in enumerate(every)
        ]
        yield [cut[: len(own)], cut[len(own) :]]


def purity(runs: Runs) -> Iterator[Finding]:
    """Whether tracing the rule twice gives one program, with the same constants, and no effect."""
    own, rest = runs.subject.at(jnp.float32)
    dy = runs.errors_like(jnp.float32, 0)
    traced, message = two_calls(runs.subject.pull, own, rest, dy)
    called = callbacks(traced)
    if "io_callback" in called:
        what = f"io_callback of {called['io_callback']}".removesuffix(" of ")
        message = f"it has a side effect, {what}; return what it sends, jax.debug.callback shows it"
    elif "pure_callback" in called and not message:
        first, second = (jax.jit(runs.subject.pull)(own, rest, dy) for _ in range(2))
        if not all(map(same, jax.tree.leaves(first), jax.tree.leaves(second))):
            message = "two calls give two answers: what pure_callback calls is not pure"
    for kind in called:
        if kind != "io_callback":
            why = f"it calls {kind}, {SEEN if kind.startswith('jax.debug') else HOST}"
            yield Finding("side effects", "", True, why, skipped=True)
    yield Finding("purity", "", not message, message or "two calls give one answer")


def jit(runs: Runs) -> Iterator[Finding]:
    """Whether the rule gives the same run one operation at a time."""
    own, rest = runs.subject.at(jnp.float32)
    dy = runs.errors_like(jnp.float32, 0)
    count = len(set(_steps(jax.make_jaxpr(runs.subject.pull)(own, rest, dy).jaxpr)))
    if count > MOST_EAGER:
        why = (
            f"not run without jit: each of its {count} different operations would be compiled by "
            f"itself, and {MOST_EAGER} are the most that is done; check its parts"
        )
        yield Finding("jit", "", True, why, skipped=True)
        return
    eager = _numbers(runs.subject.pull(own, rest, dy)[1])
    jitted = runs.at(jnp.float32).ours
    changed = [
        np.concatenate([a[None], b[1:]]) if a.shape == b.shape[1:] else a[None]
        for a, b in zip(eager, jitted, strict=True)
    ]
    yield from _compared(runs, "jit", changed, jitted, "without jit", "jit and eager runs agree")


def vmap(runs: Runs) -> Iterator[Finding]:
    """Whether a batch of two problems gives what the two give one by one."""
    own, rest = runs.subject.at(jnp.float32)
    other, _ = runs.subject.at(jnp.float32, rounded=jnp.bfloat16)
    points = [(own, runs.errors_like(jnp.float32, 0)), (other, runs.errors_like(jnp.float32, 1))]
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *points)

    @compiled
    def both(own: Leaves, rest: Leaves, dy: Leaves) -> Leaves:
        return jax.vmap(lambda own, dy: runs.subject.pull(own, rest, dy)[1])(own, dy)

    batched = _numbers(both(stacked[0], rest, stacked[1]))
    single = [_numbers(runs.evaluate(own, rest, dy)[1]) for own, dy in points]
    loop = [np.stack(leaves) for leaves in zip(*single, strict=True)]
    yield from _compared(runs, "vmap", batched, loop, "under vmap", "vmap and a loop agree")


def nonfinite(runs: Runs) -> Iterator[Finding]:
    """Whether a NaN that comes in shows in the output, and spreads no further than the reference's.

    It is put where the gradient is largest: behind a weight of zero it may vanish. At the element
    itself the gradient may be anything, and a finite limit where Inf came in is no mistake.
    """
    if not runs.has_reference:
        yield Finding("nonfinite", "", True, "no reference says where they come out", skipped=True)
        return
    own, rest = runs.subject.at(jnp.float32)
    dy = runs.errors_like(jnp.float32, 0)
    gradients = [f"the gradient of {path}" for path in runs.subject.paths]
    paths, wrong = ["the output"] * len(runs.leaves) + gradients, []
    for i, path in list(enumerate(runs.subject.paths))[:MOST_LEAVES]:
        if not own[i].size:
            continue
        place = int(np.argmax(np.abs(runs.at(jnp.float32).automatic[i][0])))
        for value, name in ((np.nan, "NaN"), (np.inf, "Inf")):
            leaf = np.array(own[i])
            leaf.flat[place] = value
            changed = [jnp.asarray(leaf) if j == i else other for j, other in enumerate(own)]
            y, ours, expected_y, truth = (
                [np.asarray(leaf, np.float64) for leaf in part]
                for part in runs.evaluate(changed, rest, dy)
            )
            sides, at = ([*y, *ours], [*expected_y, *truth]), (len(y) + i, place)
            where = f"{path}{list(map(int, np.unravel_index(place, leaf.shape)))}"
            if message := _spread(f"{name} at {where}", paths, *sides, at):
                # How far one spreads in gradients that are lost anyway is no mistake, but a note.
                lost = value is np.nan and _plain(y, expected_y, len(leaf) if leaf.ndim else 0)
                wrong.append(Finding("nonfinite", path, not lost, message, skipped=not lost))
                break
    yield from wrong
    if not wrong:
        yield Finding("nonfinite", "", True, "NaN and Inf come out where the reference's do")


def second(runs: Runs) -> Iterator[Finding]:
    """Whether each cotangent moves as the reference's does, along a direction of all arguments."""
    subject = runs.subject
    if not runs.has_reference or runs.level != jnp.float64:
        why = f"it computes in {runs.level}" if runs.has_reference else "there is no reference"
        yield Finding("second derivative", "", True, why, skipped=True)
        return
    rng = np.random.default_rng(2)

    def of(pull: Callable[..., Any]) -> Callable[..., Leaves]:
        def along(own: Leaves, rest: Leaves, dy: Leaves, way: Leaves) -> Leaves:
            moved: Leaves = jax.jvp(lambda own: pull(own, rest, dy)[1], (own,), (way,))[1]
            return moved

        return along

    run = compiled(lambda *given: (of(subject.pull)(*given), of(subject.automatic)(*given)))
    with jax.enable_x64(True):
        own, rest = subject.at(jnp.float64)
        results = []
        along = 0.0  # where all are zero, what cancels is about as large as what it is taken along
        for index in range(COTANGENTS):
            ways = [np.asarray(rng.standard_normal(leaf.shape)) for leaf in own]
            along = max(
                [along, *(np.abs(x).max(initial=0) for x in (*ways, *runs.cotangents[index]))]
            )
            try:
                results.append(run(own, rest, runs.errors_like(jnp.float64, index), ways))
            except Exception as error:
                why = f"the rule is not differentiable itself: {first_sentence(error)}"
                yield Finding("second derivative", "", True, why, skipped=True)
                return
    ours, truth = (
        [
            np.stack([np.asarray(x, np.float64) for x in leaves])
            for leaves in zip(*side, strict=True)
        ]
        for side in zip(*results, strict=True)
    )
    # Terms of every argument meet in a second derivative: the largest may cancel in another leaf.
    largest = max((np.abs(leaf).max(initial=0) for leaf in truth), default=0.0)
    rounded = float(jnp.finfo(jnp.float32).eps) * (64 * largest + along**2)
    known = Rounding(runs.length, [np.full(t.shape, rounded) for t in truth])
    verdicts = judge(subject.paths, spared(ours, truth), truth, None, jnp.float64, known)
    bad = [
        (path, verdict)
        for path, verdict in zip(subject.paths, verdicts, strict=True)
        if not (verdict.agrees or verdict.relative < 1e-8)
    ]
    for path, verdict in bad:
        message = (
            f"the derivative of the rule is off by {verdict.relative:.1e} from the reference's "
            "second derivative: at other values its gradient may be wrong"
        )
        yield Finding("second derivative", path, False, message)
    if not bad:
        message = "the rule's derivative is the reference's second derivative"
        yield Finding("second derivative", "", True, message)


CHECKS: dict[str, Check] = {
    "structure": structure,
    "zero size": empty,
    "purity": purity,
    "jit": jit,
    "vmap": vmap,
    "nonfinite": nonfinite,
    "second derivative": second,
}


def _compared(
    runs: Runs, check: str, ours: Leaves, expected: Leaves, when: str, message: str
) -> Iterator[Finding]:
    """Whether two ways to run the rule in float32 agree, but for rounding."""
    paths = runs.subject.paths
    low = runs.at(jnp.float32)
    sides = low.ours, low.ours
    if runs.has_reference:
        sides = low.automatic, runs.truth(jnp.float32).automatic
    noise = [
        np.broadcast_to(np.max(np.abs(a - t), axis=0, initial=0), b.shape)
        if a.shape == t.shape and a.shape[1:] == b.shape[1:]
        else np.zeros(b.shape)
        for a, t, b in zip(*sides, expected, strict=True)
    ]
    # A gradient that is zero but for rounding is held against the largest.
    largest = max(
        (float(np.abs(b).max(initial=0, where=np.isfinite(b))) for b in expected), default=0.0
    )
    floor = 16 * float(jnp.finfo(jnp.float32).eps) * largest
    autodiff = [b + n + floor for b, n in zip(expected, noise, strict=True)]
    level = max(("float32", runs.level.name), key=lambda d: float(jnp.finfo(d).eps))
    verdicts = judge(paths, ours, expected, autodiff, level, Rounding(runs.length))
    bad = [(p, v) for p, v in zip(paths, verdicts, strict=True) if not v.agrees]
    for path, verdict in bad:
        yield Finding(check, path, False, f"{when} it is off by {verdict.relative:.1e}")
    if not bad:
        yield Finding(check, "", True, message)


def _spread(
    name: str, paths: list[str], ours: Leaves, reference: Leaves, own: tuple[int, int]
) -> str:
    """What is wrong with where values are not finite; "" for nothing.

    `own` is the place of the leaf, and of the element in it, that the value was put in. The
    gradients of that element, and of the one that it meets in a leaf of the same shape, may be
    anything.
    """
    for path, a, b in zip(paths, ours, reference, strict=True):
        if a.shape != b.shape:
            continue
        sick, expected = (~np.isfinite(leaf).ravel() for leaf in (a, b))
        if path != "the output" and a.shape == ours[own[0]].shape:
            sick[own[1]] = expected[own[1]] = False
        if (sick & ~expected).any():
            return f"{name} makes {path} not finite where the reference's is finite"
        if name.startswith("NaN") and path == "the output" and (expected & ~sick).any():
            return f"{name} is lost in {path}, where the reference shows it"
    return ""


def _plain(ours: Leaves, reference: Leaves, length: int) -> bool:
    """Whether a NaN vanishes from the output, or reaches an example that the reference's does not.

    Where it only comes out elsewhere in what is lost anyway, as behind a top-k, no side is wrong.
    `length` is of the array's first axis that it came in by.
    """
    for a, b in zip(ours, reference, strict=True):
        rows = length if a.ndim and len(a) == length else 1
        sick, expected = (~np.isfinite(side).reshape(rows, -1).all(axis=1) for side in (a, b))
        if sick.any() != expected.any() or (rows > 1 and (sick & ~expected).any()):
            return True
    return False


def _numbers(leaves: Leaves) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in leaves]


def _steps(jaxpr: Any) -> Iterator[tuple[str, ...]]:
    """What a program compiles when it runs without jit: operations with their settings and shapes.

    The same operation on the same shapes is compiled once.
    """
    for equation in jaxpr.eqns:
        inside = programs(equation.params.values())
        if inside and equation.primitive.name not in WHOLE:
            for inner in inside:
                yield from _steps(inner)
        else:
            shapes = [str(getattr(x, "aval", x)) for x in equation.invars]
            yield (equation.primitive.name, str(equation.params), *shapes)
