"""pujax: align a small language model you own from a black box you rent, one query a prompt."""

import os

__version__ = "0.1.0"

# transformers serves as tokenizer library here: that torch is missing is no news to a user.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
