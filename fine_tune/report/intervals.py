"""How sure a measured share is."""

import math


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share of ``count`` draws (Wilson, 1927).

    Of 9 in 10 it is 0.596 to 0.982.
    """
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = z / (1 + z**2 / count)
    spread *= math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - spread), min(1.0, middle + spread)  # rounding is all there is beyond
