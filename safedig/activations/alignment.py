"""Which token of a safe twin stands where a token of the harmful prompt does: the twin may have other numbers of words.

Token by token, a twin that is a word longer differs from the prompt in all that follows. Aligned, only the harm does.
"""

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor, cdist, from_numpy
from torch.nn.functional import normalize

GAP = 0.05  # of cosine distance, for a token that has no token of its own in the other prompt


def alignment(one: Float[Tensor, "token d"], other: Float[Tensor, "another d"]) -> Int[Tensor, " token"]:
    """For each token of `one` the token of `other` that it corresponds to, in the order of both.

    Dynamic time warping (Sakoe & Chiba 1978) by cosine distance; of several tokens the nearest in ‖·‖. Time
    O(token · another · d), in as many steps as there are tokens in both; memory O(token · another).
    """
    cost = (1 - normalize(one.double(), dim=1) @ normalize(other.double(), dim=1).T).cpu().numpy()
    apart = cdist(one.double(), other.double()).cpu().numpy()
    found = np.zeros(len(one), dtype=np.int64)
    least = np.full(len(one), np.inf)
    for i, j in _path(_totals(cost)):
        if apart[i, j] < least[i]:
            found[i], least[i] = j, apart[i, j]
    return from_numpy(found)


def _totals(cost: np.ndarray) -> np.ndarray:
    """The cost of the cheapest way to each pair of tokens; all pairs on one anti-diagonal at once."""
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0.0
    for diagonal in range(rows + columns - 1):
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        before = np.minimum(total[i, j], np.minimum(total[i, j + 1], total[i + 1, j]) + GAP)
        total[i + 1, j + 1] = cost[i, j] + before
    return total


def _path(total: np.ndarray) -> list[tuple[int, int]]:
    """The pairs on the cheapest way, from the last to the first."""
    i, j = (size - 1 for size in total.shape)
    path = []
    while i and j:
        path.append((i - 1, j - 1))
        came = (total[i - 1, j - 1], total[i - 1, j] + GAP, total[i, j - 1] + GAP)
        step = int(np.argmin(came))
        i, j = i - (step != 2), j - (step != 1)
    return path
