"""Whether a policy ranks pairs rightly (Chen et al., 2024, arXiv 2405.19534).

Ranking accuracy is over the policy's own likelihoods, not over rewards implied by a reference. All
log-probs here are sums over a response's tokens, in nats, one entry a pair.
"""

import numpy as np
from jaxtyping import Float

Pairs = Float[np.ndarray, " n"]

CERTAIN = 1 - 1e-3  # stands for a certain preference, which has no finite optimum


def accuracy(chosen: Pairs, rejected: Pairs) -> float:
    """The share of pairs with π(y_w|x) >= π(y_l|x)."""
    return float(np.mean(chosen >= rejected))


def normalized_accuracy(
    chosen: Pairs, rejected: Pairs, chosen_lengths: Pairs, rejected_lengths: Pairs
) -> float:
    """The same of log-probs a token."""
    return accuracy(chosen / chosen_lengths, rejected / rejected_lengths)


def idealized_accuracy(
    ref_chosen: Pairs, ref_rejected: Pairs, *, beta: float, preference: float = CERTAIN
) -> float:
    """The share that the optimum of DPO's objective ranks rightly, however long it is trained.

    The optimum's odds are [π_ref(y_w) / π_ref(y_l)] (α / (1 - α))^(1 / β), α the `preference`: what
    share of raters prefers y_w.
    """
    gained = np.log(preference / (1 - preference)) / beta
    return float(np.mean(ref_chosen - ref_rejected + gained > 0))


def dpo_loss_bound(ref_chosen: Pairs, ref_rejected: Pairs, *, beta: float) -> Pairs:
    """DPO's loss at or below which a pair is ranked rightly, and above which it isn't (Thm 4.1).

    -log σ(β c), c = log π_ref(y_l) / π_ref(y_w): the worse the reference, the lower the loss.
    """
    return np.logaddexp(0.0, -beta * (ref_rejected - ref_chosen))
