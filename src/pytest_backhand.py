"""The pytest plugin of Backhand: a fixture and a marker that audit gradients.

    @pytest.mark.gradients
    def test_swish():
        return swish, jnp.ones((4, 8))

    def test_two_ways(gradients):
        gradients.compare(loss, other_loss, params)

Installed with the package, and found by pytest on its own. It imports nothing but pytest until a
test needs it: JAX reads its settings when it is imported, and those are for a conftest to make.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

MARKER = (
    "gradients(**settings): the test returns (subject, *arguments), which are audited as "
    "bh.check(subject, *arguments, **settings) does; or an audit or a report."
)


class Gradients:
    """The fixture `gradients`: audits that fail the test with what is wrong."""

    def __init__(self, full_trace: bool = False) -> None:
        self._full_trace = full_trace

    def check(self, subject: Any, *args: Any, **settings: Any) -> Any:
        """Audits a hand-written backward pass, and fails the test if it is wrong.

        Args:
            subject: what `bh.check` takes: an op, a layer, an objective, a function.
            args: its arguments.
            settings: of `bh.check`, such as `reference`. Costs are measured only on request, by
                `costs=True`: tests share a machine.

        Returns:
            The audit, where it passed.
        """
        import backhand

        audit = self._result(backhand.check, subject, *args, **{"costs": False, **settings})
        _settled(audit.passed, audit)
        return audit

    def compare(self, first: Any, *args: Any, **settings: Any) -> Any:
        """Compares two ways to the same gradient, and fails the test if they differ.

        Args:
            first: what `bh.compare` takes: an objective, or a function and another.
            args: the arguments.
            settings: of `bh.compare`.

        Returns:
            The report, where they agree.
        """
        import backhand

        report = self._result(backhand.compare, first, *args, **settings)
        _settled(report.agrees, f"{report.verdict}\n{report}")
        return report

    def _result(self, judge: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        """What is found; bad input fails the test in one sentence, or with all by --full-trace."""
        try:
            return judge(*args, **settings)
        except (TypeError, ValueError) as error:
            if self._full_trace:
                raise
            raise pytest.fail.Exception(
                f"{error}\n(--full-trace shows where it was raised)", pytrace=False
            ) from None


@pytest.fixture(scope="session")
def gradients(pytestconfig: pytest.Config) -> Gradients:
    """Audits of gradients: gradients.check(subject, ...) and gradients.compare(f, g, ...)."""
    return Gradients(pytestconfig.getoption("fulltrace"))


def pytest_configure(config: pytest.Config) -> None:
    """Makes the marker known."""
    config.addinivalue_line("markers", MARKER)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test with the marker, and audits what it returns."""
    markers = list(pyfuncitem.iter_markers("gradients"))
    if not markers:
        return None
    if any(marker.args for marker in markers):
        pytest.fail(
            "@pytest.mark.gradients takes settings of bh.check by name, as in "
            "@pytest.mark.gradients(reference=f); the test returns the rest",
            pytrace=False,
        )
    # The nearest marker, the test's own, has the last word.
    settings = {k: v for marker in reversed(markers) for k, v in marker.kwargs.items()}
    test = pyfuncitem.obj
    if inspect.iscoroutinefunction(test):
        pytest.fail(
            f"{pyfuncitem.name} is marked gradients; write it with def, without async",
            pytrace=False,
        )
    returned = test(
        **{name: pyfuncitem.funcargs[name] for name in inspect.signature(test).parameters}
    )
    if returned is None or isinstance(returned, list):
        pytest.fail(
            f"{pyfuncitem.name} is marked gradients and returned "
            f"{'None' if returned is None else 'a list'}; return what is to be audited, a tuple as "
            "in `return function, *arguments`",
            pytrace=False,
        )
    subject, *args = returned if isinstance(returned, tuple) else (returned,)
    if not args and hasattr(subject, "assert_passed"):  # an audit, made already
        _settled(subject.passed, subject)
    elif not args and hasattr(subject, "assert_close"):  # a report
        _settled(subject.agrees, subject)
    else:
        Gradients(pyfuncitem.config.getoption("fulltrace")).check(subject, *args, **settings)
    return True


def _settled(passed: bool, result: Any) -> None:
    """Fails the test by what is found, where it did not pass."""
    if not passed:
        pytest.fail(str(result), pytrace=False)
