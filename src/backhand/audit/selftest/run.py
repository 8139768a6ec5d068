"""Plants every bug in every row of the catalogue, row by row, in several processes if asked."""

import collections
import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from backhand.arrays import is_floating
from backhand.audit.check import check
from backhand.audit.selftest.bugs import BUGS
from backhand.audit.selftest.outcome import correct, outcome
from backhand.audit.selftest.rival import Rival
from backhand.audit.selftest.tally import Tally
from backhand.audit.selftest.trial import DTYPES, Trial
from backhand.catalogue import ROWS, Row

EVEN, ODD = {"B": 16}, {"B": 5}
"""The lengths of the batch; of other axes that may be of any length, 4 and 7."""

SEEDS, SEEDS_AGAIN = 8, 2
"""How many points a right pass is audited at, and one with another setting of an op seen before."""


def sizes_of(row: Row, quick: bool = False) -> Iterator[dict[str, int]]:
    """An even and an odd size of a row, and those at its borders.

    Only axes that the row says may be of another length get one.

    Example:
        >>> list(sizes_of(ROWS[0], quick=True))
        [{'B': 16, 'D': 4, 'I': 4}, {'B': 5, 'D': 7, 'I': 7}]
    """
    free = dict.fromkeys(axis for edge in row.edges for axis in edge if axis != "B")
    for batch, length in ((EVEN, 4), (ODD, 7)):
        every = batch | dict.fromkeys(free, length)
        yield every if _runs(row, every) else batch
    if not quick:
        yield from map(dict, row.edges)


def _runs(row: Row, sizes: Mapping[str, int]) -> bool:
    """Whether a row takes arguments of a size."""
    try:
        jax.eval_shape(lambda: row.reference(*row.arguments(jnp.float32, **sizes)))
    except (TypeError, ValueError):
        return False
    return True


def selftest(
    rows: Sequence[Row] = ROWS,
    quick: bool = False,
    say: Callable[[str], Any] = lambda line: None,
    processes: int = 1,
) -> tuple[Tally, Rival]:
    """Plants every bug in every row, at an even and at an odd size, and counts what is found.

    Args:
        rows: of the catalogue.
        quick: fewer sizes and seeds, and no `check_grads`.
        say: takes a line for each row.
        processes: how many rows are taken at a time; with several, rows are those of the catalogue.

    Returns:
        The counts, and those of `check_grads` on a sample.

    Raises:
        ValueError: for a row that is not the catalogue's, with several processes.
    """
    tally, rival, seen, turns = Tally(), Rival(), collections.Counter[str](), []
    for number, row in enumerate(rows):
        turns.append(Turn(number, seen[row.name], quick))
        seen[row.name] += 1
    if processes == 1:
        found = map(_of_row, rows, turns)
        _merge(tally, rival, rows, found, say)
        return tally, rival
    known = {id(row): place for place, row in enumerate(ROWS)}
    if unknown := [repr(row) for row in rows if id(row) not in known]:
        raise ValueError(
            f"several processes take rows of the catalogue alone, got {', '.join(unknown)}; "
            "leave out processes"
        )
    places = [known[id(row)] for row in rows]
    spawn = multiprocessing.get_context("spawn")  # threads of XLA do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        _merge(tally, rival, rows, pool.map(_of_catalogue, places, turns), say)
    return tally, rival


class Turn(NamedTuple):
    """Which row it is, how many settings of its op came before, and whether it is to be quick."""

    number: int
    again: int
    quick: bool


Found = tuple[Tally, Rival, float]


def _merge(
    tally: Tally,
    rival: Rival,
    rows: Iterable[Row],
    found: Iterable[Found],
    say: Callable[[str], Any],
) -> None:
    for row, (counts, others, seconds) in zip(rows, found, strict=True):
        tally.merge(counts)
        rival.merge(others)
        say(f"{row!r}: {seconds:.1f} s")


def _of_catalogue(place: int, turn: Turn) -> Found:
    """The row of that place: rows hold functions, which do not go from one process to another."""
    return _of_row(ROWS[place], turn)


def _of_row(row: Row, turn: Turn) -> Found:
    """What is found in one row, and the seconds it took."""
    tally, rival, begin = Tally(), Rival(), time.perf_counter()
    number, again, quick = turn
    if not any(map(is_floating, jax.tree.leaves(jax.eval_shape(row.arguments)))):
        return tally, rival, 0.0  # integers alone have no gradient
    failures = check(row, costs=False).failures
    tally.audit(repr(row), [f"{found.check} {found.message}" for found in failures])
    places = list(enumerate(sizes_of(row, quick)))
    for place, sizes in places[again % 2 : again % 2 + 1] if again else places:
        trial = Trial(row, **sizes)
        seeds = SEEDS_AGAIN if again else SEEDS
        _audit_right(tally, trial, 1 if quick or place > 1 else seeds)
        if place < 2:
            _audit_wrong(tally, trial)
            if not quick and not again:
                rival.add(trial, 2 * number + place)
    if not quick:
        jax.clear_caches()  # no row's programs are used by another
    return tally, rival, time.perf_counter() - begin


def _audit_right(tally: Tally, trial: Trial, seeds: int) -> None:
    for seed in range(seeds):
        for dtype in DTYPES:
            tally.right(dtype.name, repr(trial), correct(trial, dtype, seed))


def _audit_wrong(tally: Tally, trial: Trial) -> None:
    for bug in BUGS.values():
        for site in trial.sites[:1] if bug.whole else trial.sites:
            wrong = trial.wrong(bug, site)
            if wrong is None:
                continue
            for dtype in DTYPES:
                said = outcome(trial, dtype, wrong)
                tally.bug(dtype.name, bug.kind, repr(trial), said, bug.causes)
