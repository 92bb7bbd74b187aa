"""How much is worked on at once: on a CPU what its caches hold, elsewhere what fills the device.

A loop's turn costs an accelerator as much as a product that leaves most of it idle, so there a tile
is as large as memory bears. Which it is, is asked when a function is traced.
"""

import jax

QUERIES = 64  # of a row in attention, on a CPU, and the fewest elsewhere
MOST_QUERIES = 1024
SCORES = 2**27  # attention's scores in memory at once where that leaves more queries: 512 MiB
TOKENS, MOST_TOKENS = 512, 8192  # that are unembedded at once
WORDS, MOST_WORDS = 4096, 8192  # of the vocabulary, about, whose logits are in memory at once


def on_cpu() -> bool:
    """Whether what is traced now is for a CPU."""
    return jax.default_backend() == "cpu"


def queries(keys: int) -> int:
    """How many queries a row attention takes at once, if each has so many scores in all rows."""
    return QUERIES if on_cpu() else min(MOST_QUERIES, max(QUERIES, SCORES // max(1, keys)))


def tokens() -> int:
    """How many tokens are unembedded at once."""
    return TOKENS if on_cpu() else MOST_TOKENS


def words() -> int:
    """About how many words' logits are in memory at once."""
    return WORDS if on_cpu() else MOST_WORDS
