"""Two alarms on an RL run, after arXiv 2606.18487, relative to the base."""

from __future__ import annotations

from lightning_rejuv.verdict import ENTROPY_AT_RISK, ENTROPY_OVER_CONFIDENT

#: Share of the initial entropy below which RL is flagged, early in the run.
ENTROPY_FALL = 0.5
#: Share of the planned steps that counts as early. The paper does not say; a quarter is a choice made here.
EARLY = 0.25


def rl_alarms(
    initial_entropy: float,
    entropy: float,
    progress: float,
    *,
    base_entropy: float | None = None,
    rejuvenated: bool = False,
) -> dict[str, str]:
    """Tell whether an RL run shows one of the two signs of an over-confident start.

    The first sign is that the entropy was less than 0.05 of the base's when RL began, the limit of
    :func:`lightning_rejuv.verdict.judge`; the paper's 0.18 nats belong to one model. It is not looked for if the base's
    entropy is not known. The second is a fall by more than half early in the run; a fall that leaves more than 0.3
    of the base's entropy does not count.

    Args:
        initial_entropy: token entropy when RL began, nats.
        entropy: token entropy now, measured in the same way.
        progress: share of the planned steps that are done, 0 to 1; NaN if it is not known, and no fall is early then.
        base_entropy: the base's token entropy, measured in the same way; None if it is not known.
        rejuvenated: whether the model was rejuvenated in this run.

    Returns:
        A text for each alarm, by its name: ``"low_entropy"``, ``"entropy_fall"``; empty if all is well.

    >>> list(rl_alarms(0.4, 0.15, progress=0.1)), list(rl_alarms(0.4, 0.15, progress=0.9))
    (['entropy_fall'], [])
    >>> list(rl_alarms(0.01, 0.01, progress=0.1, base_entropy=0.4)), rl_alarms(0.01, 0.01, progress=0.1)
    (['low_entropy'], {})
    """
    alarms = {}
    if base_entropy is not None and initial_entropy < ENTROPY_OVER_CONFIDENT * base_entropy:
        advice = "Rejuvenate, or take an earlier checkpoint."
        if rejuvenated:
            advice = "It was rejuvenated in this run: take an earlier checkpoint, or a smaller `alpha`."
        alarms["low_entropy"] = (
            f"RL started at a token entropy of {initial_entropy:.3f} nats, less than {ENTROPY_OVER_CONFIDENT:g} of the "
            f"base's {base_entropy:.3f}: RL hardly improves such over-confident checkpoints. {advice}"
        )
    low = base_entropy is None or entropy < ENTROPY_AT_RISK * base_entropy
    if progress <= EARLY and low and entropy < ENTROPY_FALL * initial_entropy:
        alarms["entropy_fall"] = (
            f"Token entropy fell from {initial_entropy:.3f} to {entropy:.3f} nats, by more than half, within the first "
            f"{EARLY:.0%} of the planned steps: such runs stalled in arXiv 2606.18487."
        )
    return alarms
