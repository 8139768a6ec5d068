"""The pytest plugin: the marker and the fixture pass right gradients and say how others are wrong.

Each test runs pytest inside of this process, on a file of its own; what depends on a fresh process
runs in one.
"""

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

HEADER = """
import pytest, jax, jax.numpy as jnp, backhand as bh

def made(factor):
    @jax.custom_vjp
    def square(x):
        return x * x
    square.defvjp(lambda x: (x * x, x), lambda x, dy: (factor * x * dy,))
    return square

X = jnp.array([1.0, 2.0, -3.0])
"""


@pytest.fixture
def run(pytester):
    """Runs a file of tests with the plugin."""

    def run(body, *options):
        pytester.makepyfile(HEADER + body)
        return pytester.runpytest_inprocess(
            "-p", "pytest_backhand", "-p", "no:cacheprovider", "--strict-markers", *options
        )

    return run


def test_a_right_gradient_passes_by_marker_and_by_fixture(run):
    result = run(
        """
@pytest.mark.gradients
def test_marked():
    return made(2), X

class TestInAClass:
    @pytest.mark.gradients
    @pytest.mark.parametrize("shape", [(2,), (2, 3)])
    def test_parametrized(self, shape):
        return made(2), jnp.ones(shape)

def test_fixture(gradients):
    audit = gradients.check(made(2), X)
    assert audit.passed
    assert audit.cost is None
    assert gradients.check(made(2), X, costs=True).cost is not None
    assert gradients.compare(made(2), jnp.square, X).agrees
"""
    )
    result.assert_outcomes(passed=4)


def test_an_audit_or_a_report_that_is_returned_is_the_verdict(run):
    result = run(
        """
import backhand as bh

@pytest.mark.gradients
@pytest.mark.parametrize("factor", [2, 3])
def test_audit(factor):
    return bh.check(made(factor), X, costs=False)

@pytest.mark.gradients
@pytest.mark.parametrize("factor", [2, 3])
def test_report(factor):
    return bh.compare(made(factor), jnp.square, X)
"""
    )
    result.assert_outcomes(passed=2, failed=2)


def test_a_wrong_gradient_fails_with_the_leaf_and_the_cause_and_no_traceback(run):
    result = run(
        """
@pytest.mark.gradients
def test_marked():
    return made(-2), X

def test_check(gradients):
    gradients.check(made(-2), X)

def test_compare(gradients):
    gradients.compare(made(-2), jnp.square, X)
"""
    )
    result.assert_outcomes(failed=3)
    text = result.stdout.str()
    assert text.count("the sign is flipped") >= 3
    assert "Traceback" not in text
    assert "pytest_backhand.py" not in text


def test_settings_of_the_marker_reach_the_audit(run):
    result = run(
        """
def cube(x):
    return x ** 3

pytestmark = pytest.mark.gradients(name="of the module")

@pytest.mark.gradients(reference=jnp.square)
def test_same():
    return made(2), X

@pytest.mark.gradients(reference=cube, name="of the test")
def test_another():
    return made(2), X
"""
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*of the test: FAILED*"])


def test_a_row_of_the_catalogue_may_be_returned_alone(run):
    result = run(
        """
from backhand.catalogue import ROWS

@pytest.mark.gradients
@pytest.mark.parametrize("row", [row for row in ROWS if row.name == "ops.relu"], ids=repr)
def test_row(row):
    return row
"""
    )
    result.assert_outcomes(passed=1)


REFUSED = {
    "return None": "test_it is marked gradients and returned None; return what is to be audited",
    "return 3, X": "got int 3",
    "return made(2), [1.0, 2.0]": "is a Python list of numbers; give an array",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_cannot_be_audited_is_refused_in_a_sentence(run, body):
    result = run(f"\n@pytest.mark.gradients\ndef test_it():\n    {body}\n")
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert REFUSED[body] in " ".join(text.split())
    assert "Traceback" not in text
    assert len(text.splitlines()) < 30


def test_an_async_test_is_refused(run):
    result = run("\n@pytest.mark.gradients\nasync def test_it():\n    return made(2), X\n")
    result.assert_outcomes(failed=1)
    assert "without async" in result.stdout.str()


def test_a_positional_setting_is_refused(run):
    result = run("\n@pytest.mark.gradients(3)\ndef test_it():\n    return made(2), X\n")
    result.assert_outcomes(failed=1)
    assert "takes settings of bh.check by name" in result.stdout.str()


def test_the_original_error_is_shown_on_request(run):
    body = "\ndef test_it(gradients):\n    gradients.check(3, X)\n"
    assert "--full-trace shows where it was raised" in run(body).stdout.str()
    assert "subject_of" in run(body, "--full-trace").stdout.str()


def test_an_error_of_the_test_itself_is_shown_as_ever(run):
    result = run("\n@pytest.mark.gradients\ndef test_it():\n    raise RuntimeError('mine')\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*RuntimeError: mine"])


def test_the_marker_is_registered_and_tests_without_it_are_left_alone(run):
    result = run("\ndef test_plain():\n    assert True\n", "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.gradients(*settings): the test returns*"])


def test_it_imports_nothing_but_pytest():
    """JAX reads its settings when it is imported, and a conftest is yet to make them."""
    program = (
        "import sys, pytest_backhand\n"
        "bad = {'jax', 'jaxlib', 'numpy', 'backhand', 'jaxtyping'} & sys.modules.keys()\n"
        "sys.exit(', '.join(sorted(bad)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_can_be_switched_off(pytester, monkeypatch):
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_backhand")
    pytester.makepyfile("def test_it(gradients):\n    pass\n")
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
    result = pytester.runpytest_inprocess("-p", "no:backhand")
    assert "fixture 'gradients' not found" in result.stdout.str()


def test_it_works_in_parallel_processes(pytester, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    pytester.makepyfile(
        HEADER
        + """
@pytest.mark.gradients
@pytest.mark.parametrize("factor", [2, -2])
def test_it(factor):
    return made(factor), X
"""
    )
    result = pytester.runpytest_subprocess("-p", "pytest_backhand", "-n", "1")
    result.assert_outcomes(passed=1, failed=1)
    assert "the sign is flipped" in result.stdout.str()
