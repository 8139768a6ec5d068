"""The verdict on planted bugs and on right passes, and what is no bug at all."""

import dataclasses

import jax
import numpy as np
import pytest

import backhand as bh
from backhand import ops
from backhand.audit.selftest.bugs import BUGS
from backhand.audit.selftest.outcome import correct, outcome
from backhand.audit.selftest.trial import DTYPES, F32, F64, Trial
from backhand.catalogue import ROWS


def trial_of(subject, **sizes):
    return Trial(next(row for row in ROWS if row.subject is subject), **sizes)


@pytest.fixture(scope="module")
def norm():
    return trial_of(ops.layer_norm, B=6)


@pytest.fixture(scope="module")
def statistics():
    return trial_of(bh.batch_norm, B=6)


def said(trial, kind, leaf=0, dtype=F32):
    """What the audit says of a bug."""
    return outcome(trial, dtype, trial.wrong(BUGS[kind], trial.sites[leaf]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_right_pass_is_found_right(norm, dtype, seed):
    assert correct(norm, dtype, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("leaf", "path"), list(enumerate(["x", "scale", "offset"])))
@pytest.mark.parametrize("kind", ["sign", "factor 1.001", "missing mean", "missing path"])
def test_a_bug_is_caught_in_its_leaf_with_its_cause(norm, dtype, leaf, path, kind):
    found = said(norm, kind, leaf, dtype)
    assert found.named == found.changed == {path}
    assert found.leaf_named
    assert found.cause.kind in BUGS[kind].causes


def test_the_mean_of_layer_norm_is_no_term_to_drop(norm):
    """Its error has no mean over the features, so that taking it away changes nothing."""
    found = said(norm, "dropped term")
    assert (found.changed, found.named, found.cause) == (frozenset(), frozenset(), None)


def test_another_sign_of_nothing_is_no_bug(statistics):
    running = statistics.paths.index("running/mean")
    for dtype in DTYPES:
        assert not said(statistics, "sign", running, dtype).changed
        assert said(statistics, "constant added", running, dtype).cause.kind == "spurious"


def test_a_gradient_that_is_rounding_alone_is_no_bug_in_another_sign():
    row = next(row for row in ROWS if repr(row).startswith("combinators.chain(drop"))
    row = dataclasses.replace(
        row, settings={"out": bh.dense(4), "norm": bh.batch_norm()}, side={"training": True}
    )
    trial = Trial(row, B=6)
    bias = trial.paths.index("out/b")
    assert 0 < np.abs(trial.at(F32).automatic[bias]).max() < 1e-4
    for dtype in DTYPES:
        assert correct(trial, dtype, 0)
        assert not said(trial, "sign", bias, dtype).changed


def test_the_same_leaf_and_cause_as_check_names():
    """The self-test's verdict is that of `bh.check`."""
    op = ops.tanh

    @jax.custom_vjp
    def function(x):
        return op.reference(x)

    function.defvjp(op.forward, lambda y, dy: (1.001 * op.backward(y, dy),))
    (x,) = next(row for row in ROWS if row.subject is op).arguments()
    audit = bh.check(function, x, reference=op.reference, costs=False)
    assert [finding.cause.kind for finding in audit.failures if finding.check == "gradient"] == [
        said(trial_of(op), "factor 1.001", dtype=F64).cause.kind
    ]


def test_structure_is_its_own_cause(norm):
    for kind in ("wrong dtype", "an axis of one too many"):
        found = said(norm, kind, 1)
        assert found.named == {"scale"}
        assert found.cause.kind == "structure"
