"""`python -m backhand` is the command line."""

import subprocess
import sys


def test_the_module_runs_as_the_command_does():
    done = subprocess.run(
        [sys.executable, "-m", "backhand", "check", "ops.no_such_row"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("backhand check: error: the catalogue has no row")


def test_importing_it_runs_nothing():
    import backhand.__main__

    assert backhand.__main__.main is not None


def test_a_reader_that_goes_away_changes_nothing():
    with subprocess.Popen(
        [sys.executable, "-m", "backhand", "check", "ops.relu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        program.stdout.close()
        _, said = program.communicate(timeout=300)
    assert program.returncode == 0, said
    assert "BrokenPipe" not in said
