"""Pass rate below which most groups of rollouts teach nothing."""

from __future__ import annotations

import math

from lightning_rejuv.functional._checks import check_count


def critical_pass_rate(group_size: int) -> float:
    r"""Pass rate at which half of the groups are all failures, ``p*(g) = 1 - 2^{-1/g}``.

    The solution of ``(1 - p)^g = 1/2``, which neglects ``p^g``; arXiv 2606.18487 quotes 0.083 for g = 8.

    Args:
        group_size: rollouts a prompt, g >= 2.

    Returns:
        The pass rate, in (0, 0.3].

    Raises:
        ValueError: g < 2.

    >>> round(critical_pass_rate(8), 4)
    0.083
    """
    check_count("group_size", group_size, at_least=2)
    return -math.expm1(-math.log(2.0) / group_size)  # 1 - 2**x would lose the digits of a large group's
