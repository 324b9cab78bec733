"""What speaks against an alpha before its curve does: few data, samples without an end, swapped models."""

from __future__ import annotations

from lightning_rejuv.verdict import ENTROPY_LOW

#: The share of the base's samples that may be cut off without a word.
_UNFINISHED = 0.1
#: Token entropy over the negative log-likelihood of demonstrations: in eight models of a real ladder at most 0.96 on
#: lines that SFT has not seen, at least 1.23 on those that it was trained on (docs/results/seen.json).
_SEEN = 1.1
#: With fewer demonstrations, or samples of the base, alpha depends on which they are.
_FEW = 8


def doubt_few(demonstrations: int, samples: int) -> tuple[str, ...]:
    """Say that an alpha goes by few demonstrations, or by few samples of the base, if it does.

    >>> print(*doubt_few(1, 20))
    Alpha goes by 1 demonstration and 20 samples of the base: with fewer than 8 it depends on which they are.
    """
    if min(demonstrations, samples) >= _FEW:
        return ()
    return (
        f"Alpha goes by {counted(demonstrations, 'demonstration')} and {counted(samples, 'sample')} of the base: with "
        f"fewer than {_FEW} it depends on which they are.",
    )


def doubt_swapped(nll: tuple[float, float], entropy: tuple[float, float]) -> tuple[str, ...]:
    """Say that SFT seems to have taught the reverse, if it does: the demonstrations are less likely, and less certain.

    An over-confident model finds demonstrations that it has not seen less likely, too, but with a lower entropy.

    Args:
        nll: negative log-likelihood of the demonstrations under the base and under the SFT model, nats a response.
        entropy: mean token entropy of both on them, nats.

    >>> doubt_swapped((10.0, 13.0), (1.0, 0.3))
    ()
    >>> print(*doubt_swapped((10.0, 13.0), (0.3, 4.0)))
    The SFT model finds the demonstrations less likely than the base does (13.00 nats a response, the base ...
    """
    (base, sft), (entropy_base, entropy_sft) = nll, entropy
    if sft <= base or entropy_sft <= entropy_base:
        return ()
    return (
        f"The SFT model finds the demonstrations less likely than the base does ({sft:.2f} nats a response, the base "
        f"{base:.2f}) and is less certain there (token entropy {entropy_sft:.3f} nats, the base's {entropy_base:.3f}): "
        "are the two swapped, has it diverged, or are they not of the kind that SFT trained on?",
    )


def doubt_seen(nll: float, entropy: tuple[float, float]) -> tuple[str, ...]:
    """Say that the demonstrations seem to be those that SFT trained on, if they do: likelier than the model expects.

    What a model has memorised costs it less than its entropy, the expected cost of what it samples itself; what is new
    costs an over-confident model more. Lines that hold nothing new, as the toy's, are like those it has memorised.
    Only a model whose entropy is below half of its base's is judged.

    Args:
        nll: mean negative log-likelihood of the demonstrations' tokens under the SFT model, nats.
        entropy: mean token entropy of the base and of the SFT model on them, nats.

    >>> doubt_seen(0.62, (0.9, 0.06))
    ()
    >>> print(*doubt_seen(0.001, (0.9, 0.004)))
    The SFT model finds the demonstrations likelier than it expects (0.001 nats a token, its entropy is 0.004): ...
    """
    base, sft = entropy
    if sft >= ENTROPY_LOW * base or sft <= _SEEN * nll:
        return ()
    return (
        f"The SFT model finds the demonstrations likelier than it expects ({nll:.3f} nats a token, its entropy is "
        f"{sft:.3f}): was it trained on them, or do they hold nothing new? Over-confidence does not show there. Take "
        "lines that SFT has not seen.",
    )


def doubt_unfinished(samples: int, unfinished: int | None) -> tuple[str, ...]:
    """Say that many of the base's samples were cut off, if they were.

    Args:
        samples: how many there are.
        unfinished: how many came to no end; None if nobody knows.

    >>> doubt_unfinished(20, 1), doubt_unfinished(20, None)
    ((), ())
    """
    if unfinished is None or unfinished <= _UNFINISHED * samples:
        return ()
    return (f"{unfinished} of the base's {samples} samples did not end: their beginnings were judged.",)


def counted(number: int, what: str) -> str:
    """Return a number of things in words.

    >>> counted(1, "sample"), counted(2, "sample")
    ('1 sample', '2 samples')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"
