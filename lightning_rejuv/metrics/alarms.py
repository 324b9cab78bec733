"""The two alarms of arXiv 2606.18487 on an RL run."""

from __future__ import annotations

#: Pre-RL token entropy, nats, below which the study flags a checkpoint (Qwen2.5-Coder-3B, five SFT depths).
#: It is absolute as it was published; other models and prompts have other entropies: the base's own decides whether
#: it says anything.
PRE_RL_ENTROPY = 0.18
#: Share of the initial entropy below which RL is flagged, early in the run.
ENTROPY_FALL = 0.5
#: What counts as early: the paper does not say; a quarter of the planned steps is ours.
EARLY = 0.25


def rl_alarms(
    initial_entropy: float,
    entropy: float,
    progress: float,
    *,
    base_entropy: float | None = None,
    rejuvenated: bool = False,
) -> dict[str, str]:
    """Tell whether an RL run shows one of the two signs of a collapsed start.

    The first is absolute, and says nothing where the base itself lies below it. Where the base's entropy is not
    known and the model has just been rejuvenated, nothing is known to be wrong with it either.

    Args:
        initial_entropy: token entropy when RL began, nats.
        entropy: token entropy now, measured alike.
        progress: share of the planned steps that are done, 0 to 1.
        base_entropy: the base's token entropy, measured alike; None where it is not known.
        rejuvenated: whether the model was rejuvenated in this run.

    Returns:
        A text by the alarm's name: ``"low_entropy"``, ``"entropy_fall"``; empty where all is well.

    >>> list(rl_alarms(0.4, 0.15, progress=0.1)), list(rl_alarms(0.4, 0.15, progress=0.9))
    (['entropy_fall'], [])
    >>> rl_alarms(0.1, 0.1, progress=0.1, base_entropy=0.12)
    {}
    """
    alarms = {}
    expected = not rejuvenated if base_entropy is None else base_entropy > PRE_RL_ENTROPY
    if expected and initial_entropy < PRE_RL_ENTROPY:
        base = "" if base_entropy is None else f" and the base's {base_entropy:.3f}"
        advice = "Rejuvenate, or take an earlier checkpoint."
        if rejuvenated:
            advice = "It was rejuvenated in this run: take an earlier checkpoint, or a smaller `alpha`."
        alarms["low_entropy"] = (
            f"RL started at a token entropy of {initial_entropy:.3f} nats, below {PRE_RL_ENTROPY}{base}: "
            f"checkpoints below it hardly gained from GRPO in arXiv 2606.18487. {advice}"
        )
    if progress <= EARLY and entropy < ENTROPY_FALL * initial_entropy:
        alarms["entropy_fall"] = (
            f"Token entropy fell from {initial_entropy:.3f} to {entropy:.3f} nats, by more than half, within "
            f"the first {EARLY:.0%} of the run: such runs collapsed in arXiv 2606.18487."
        )
    return alarms
