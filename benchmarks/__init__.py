"""Measurements against `jax.grad` and against peers, in one run, interleaved."""
