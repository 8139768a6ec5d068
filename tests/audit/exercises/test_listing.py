"""The list of exercises: in order of difficulty, each found by its name."""

import pytest

import backhand as bh


def test_they_are_in_order_of_difficulty():
    listing = bh.audit.exercises()
    levels = [each.difficulty for each in listing]
    assert levels == sorted(levels)
    assert set(levels) == {1, 2, 3, 4, 5}
    assert len({each.name for each in listing}) == len(listing) >= 12


def test_the_list_is_a_line_each():
    listing = bh.audit.exercises()
    lines = str(listing).splitlines()
    assert len(lines) == len(listing)
    assert max(map(len, lines)) <= 100
    assert lines[0].endswith("y = a x, with one number a for the whole of x.")
    assert lines[0].split()[:2] == ["1", "scale"]


def test_each_is_found_by_its_name():
    for each in bh.audit.exercises():
        assert bh.audit.exercise(each.name).task is each.task
        assert each.forward is each.task.forward
        assert len(each.task.hints) >= 3


@pytest.mark.parametrize("name", ["layernorm", None, 3])
def test_an_unknown_name_is_refused(name, unchecked):
    with pytest.raises(
        ValueError, match=r"there is no exercise .*exercises\(\) lists all"
    ) as caught:
        bh.audit.exercise(name)
    assert ("did you mean 'layer_norm'?" in str(caught.value)) == (name == "layernorm")
