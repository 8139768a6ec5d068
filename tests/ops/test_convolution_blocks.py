"""Block by block is the same as at once."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhand.ops.convolution_blocks import block_size, by_examples, each_block
from tests.support import assert_close, normal


@given(st.integers(1, 60), st.integers(0, 70))
def test_a_block_is_no_larger_than_allowed_and_divides_where_that_costs_little(length, most):
    size = block_size(length, most)
    assert 1 <= size <= max(1, min(length, most))
    if length % size:
        assert size == most and not any(length % n == 0 for n in range(most // 2 + 1, most + 1))


@pytest.mark.parametrize(("length", "most"), [(0, 4), (1, 4), (8, 4), (7, 4), (7, 0), (11, 3)])
def test_blocks_together_are_the_whole(length, most, x64):
    x = normal(0, length, 3)
    zeros = normal(1, 3) * 0

    def add(sums, start, count):
        return sums + jax.lax.dynamic_slice_in_dim(x, start, count).sum(0)

    assert_close(each_block(add, zeros, length, most), x.sum(0), floor=1e-12)
    assert_close(by_examples(lambda x: x[:, :2] ** 2, x, max(1, most)), x[:, :2] ** 2)
