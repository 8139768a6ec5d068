"""Attention by blocks: which keys a block meets, and blocks of every kind against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import backhand as bh
from backhand.ops.attention_blocks import Head, Scores, backward_head, forward_head, spans
from tests.support import assert_close, labels, normal

FULL = Scores(False, None, 1.0, None, "float64", "float64")


def visible(tokens, keys, how):
    apart = np.arange(tokens)[:, None] - np.arange(keys)
    seen = apart >= 0 if how.causal else np.ones_like(apart, bool)
    return seen if how.window is None else seen & (np.abs(apart) < how.window)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("sizes", [(7, 7, 2), (7, 3, 2), (3, 9, 4), (40, 40, 2), (1, 1, 1)])
def test_every_token_is_in_one_block_that_has_all_keys_it_sees(causal, window, sizes):
    tokens, keys, rows = sizes
    how = FULL._replace(causal=causal, window=window)
    found = spans(tokens, keys, rows, how)
    covered = [t for span in found for t in range(span.start, span.last + 1)]
    assert covered == list(range(tokens))
    seen = visible(tokens, keys, how)
    for span in found:
        for start in range(span.start, span.last + 1, span.rows):
            first = int(span.first(start))
            assert span.lo <= first < first + span.width <= span.hi <= keys
            outside = np.delete(
                seen[start : start + span.rows], np.s_[first : first + span.width], 1
            )
            assert not outside.any()


def test_no_more_than_a_few_blocks_are_written_out():
    assert len(spans(8192, 8192, 64, FULL)) == 1
    causal = spans(8192 + 5, 8192 + 5, 64, FULL._replace(causal=True))
    assert len(causal) == 17
    scores = sum(span.scores for span in causal)
    assert scores < 8197**2 * (1 / 2 + 1 / 16)


@pytest.mark.parametrize(("causal", "sides"), [(True, 1), (False, 2)])
def test_scores_grow_as_the_tokens_times_the_window(causal, sides):
    """However long: each row is set against its window and what the other rows of its block see."""
    how = FULL._replace(causal=causal, window=256)
    for tokens in (1024, 2048, 8192, 32768, 32768 + 5):
        scores = sum(span.scores for span in spans(tokens, tokens, 128, how))
        assert scores < 1.34 * tokens * (128 + sides * 255)
    assert len(spans(32768 + 5, 32768 + 5, 128, how)) == 2


CASES = [
    (2, True, "plain"),
    (2, True, "shared bias"),
    (2, False, "window"),
    (1, True, "short window"),
    (2, False, "short window, masked, biased"),
    (2, False, "bias"),
    (7, True, "window"),
    (7, True, "masked"),
    (64, True, "bias"),
    (64, False, "masked"),
]


@pytest.mark.parametrize(("rows", "causal", "kind"), CASES)
def test_blocks_of_any_size_give_what_the_whole_gives(rows, causal, kind, x64):
    """In blocks of one or two, loops over blocks; of seven, each for itself; of 64, the whole.

    Each with its rows first and with its keys first.
    """
    tokens, keys, group, features = 43, 39, 2, 3
    q, k, v = (
        normal(0, tokens, group, features),
        normal(1, keys, features),
        normal(2, keys, features),
    )
    bias = {"bias": normal(3, group, tokens, keys), "shared bias": normal(3, 1, tokens, keys)}
    bias["short window, masked, biased"] = bias["bias"]
    masked = "masked" in kind
    head = Head(
        q,
        k,
        v,
        bias.get(kind),
        labels(4, 2, keys) > 0 if masked else None,
        labels(5, 2, tokens) if masked else None,
        labels(6, 2, keys) if masked else None,
    )
    window = 2 if "short" in kind else 5 if "window" in kind else None
    how = FULL._replace(causal=causal, window=window, soft_cap=2.0)
    assert ("short" in kind) == spans(tokens, keys, rows, how)[0].moves
    do = normal(7, *q.shape)

    @jax.jit
    def ours(head, do):
        def held(how):
            o, normalizers = forward_head(head, rows=rows, how=how)
            return o, backward_head(head, normalizers, do, rows=rows, how=how)

        return [held(how._replace(keys_first=first)) for first in (False, True)]

    @jax.jit
    def truth(head, do):
        def reference(q, k, v, bias):
            more = [None if x is None else x[None] for x in (head.mask, *head[5:])]
            return bh.ops.attention.reference(
                *(x[None] for x in (q, k[:, None], v[:, None])),
                None if bias is None else bias[None],
                more[0],
                None,
                *more[1:],
                causal=how.causal,
                window=how.window,
                scale=how.scale,
                soft_cap=how.soft_cap,
            )[0]

        y, back = jax.vjp(reference, *head[:4])
        return y, back(do)

    exact = truth(head, do)
    for result in ours(head, do):
        assert_close(result, exact)


def test_products_may_read_less_than_they_give():
    q, k = normal(0, 4, 1, 3, dtype="bfloat16"), normal(1, 5, 3, dtype="bfloat16")
    head = Head(q, k, k, None, None, None, None)
    how = FULL._replace(reads="bfloat16", gives="float32")
    o, normalizers = forward_head(head, rows=2, how=how)
    errors = backward_head(head, normalizers, o, rows=2, how=how)
    assert {x.dtype for x in (o, *normalizers, *errors[:3])} == {jnp.dtype("float32")}
    exact = forward_head(head, rows=2, how=how._replace(reads="float32"))[0]
    assert_close(o, exact, 2e-2)
