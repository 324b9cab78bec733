"""What a rejuvenation or a diagnosis of directories is given: what it may be, and whether it has an effect."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch

from lightning_rejuv import _compat
from lightning_rejuv.checkpoints.stream import DTYPES
from lightning_rejuv.config import USES_OF_CALIBRATION, ComputeDtype, Options, PathLike
from lightning_rejuv.weights.rounding import HALF_TYPES

COMPUTE_DTYPES: tuple[str, ...] = get_args(ComputeDtype)
# Why a diagnosis without calibration data takes no option of a model, and what to do, in messages.
WITHOUT_CALIBRATION = ("without `calibration`", "pass `calibration`")


@dataclass(frozen=True)
class Running:
    """How the models of two directories are run, and on what.

    Attributes:
        calibration: JSONL; None if no model is to be run.
        device: the device that they are run on.
        compute_dtype: one of :data:`COMPUTE_DTYPES`.

    Raises:
        ValueError: the dtype is none that models are run in.
    """

    calibration: PathLike | None = None
    device: str = "cpu"
    compute_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"Expected argument `compute_dtype` to be one of {sorted(COMPUTE_DTYPES)} but got "
                f"{self.compute_dtype!r}."
            )

    @property
    def given(self) -> list[str]:
        """The names of what differs from the default.

        >>> Running(device="cuda").given
        ['device']
        """
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    def run_in(self) -> str:
        """Return the dtype that models are run in: what was asked for, or for ``"auto"`` what the device is made for.

        That is bfloat16 if the hardware multiplies in it, else float32, whatever dtype the checkpoint has: the
        models are only measured, and the weights that are written are computed in float32 or wider in any case.
        float16 is never chosen: gradients of the entropy are small enough to underflow in it.

        >>> Running(compute_dtype="float16").run_in()
        'float16'
        """
        if self.compute_dtype != "auto":
            return self.compute_dtype
        return "bfloat16" if _compat.computes_fast_in_bfloat16(torch.device(self.device)) else "float32"


def given_alpha(alpha: float | str | Mapping[str, float]) -> Any:
    """Return an alpha as it was given, or if that is the path of a YAML file, what the file holds.

    Raises:
        ValueError: it is a text of another kind than "auto" and a path that ends with ``.yaml`` or ``.yml``, or the
            file is malformed.
        OSError: the file cannot be read.

    >>> given_alpha(0.4), given_alpha("auto")
    (0.4, 'auto')
    """
    if not isinstance(alpha, str) or alpha == "auto":
        return alpha
    if not alpha.endswith((".yaml", ".yml")):
        raise ValueError(
            'Expected argument `alpha` to be a number in [0, 1], "auto", a mapping of name patterns to such numbers or '
            f"the path of a YAML file (.yaml) with one, but got {alpha!r:.200}."
        )
    return read_alphas(Path(alpha).expanduser())


def read_alphas(path: Path) -> dict[str, float]:
    """Read an alpha for each pattern of names on disk (``*`` and ``?``); the first that fits counts.

    .. code-block:: yaml

        "*.layers.0.*": 0.8
        "*embed_tokens*": 0.4
        "*": 0.5

    Raises:
        ValueError: it is not YAML of this form.
        OSError: it cannot be read.
    """
    import yaml  # type: ignore[import-untyped]

    form = f"Expected {str(path)!r} to map patterns of tensor names to numbers, the last pattern '*',"
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # no UTF-8; a number of more digits than Python reads
        raise ValueError(f"{form} but it is not YAML: {error}.") from error
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{form} but got {content!r:.200}.")
    return content


def check_device(device: str) -> None:
    """Refuse a device that torch does not know, or that this machine does not have.

    Args:
        device: as torch names it: "cpu", "cuda", "cuda:1", "mps".

    Raises:
        ValueError: it cannot be used; the message lists the devices that can.
        torch.OutOfMemoryError: its memory is full.

    >>> check_device("gpu")
    Traceback (most recent call last):
    ...
    ValueError: Expected argument `device` to be a device that torch can use here, ... but got 'gpu': ...
    """
    try:
        kind, reason = torch.device(device).type, ""
        if kind == "meta":
            reason = "it holds no numbers"
        else:
            torch.zeros(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # every back end has its own kind
        reason = str(error).partition("\n")[0]
    if reason:
        cuda = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
        usable = ", ".join(["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])])
        raise ValueError(
            f"Expected argument `device` to be a device that torch can use here, one of {usable}, but got "
            f"{device!r}: {reason}"
        )


def check_dtype(asked: str | None) -> None:
    """Refuse a dtype that no output is written in; None is the checkpoint's own.

    Raises:
        ValueError: the message lists those that can be asked for.
    """
    if asked is not None and asked not in DTYPES:
        raise ValueError(f"Expected argument `dtype` to be one of {sorted(DTYPES)} but got {asked!r}.")


def check_options(asked: Options, running: Running, dtype: str | None) -> None:
    """Refuse what cannot be meant, before a file is opened.

    Args:
        asked: the options of the method.
        running: how models are run.
        dtype: the output's; None for the checkpoint's own.

    Raises:
        ValueError: one is out of range, has no effect beside the others, or is missing; or the device cannot be used.
    """
    check_dtype(dtype)
    if not asked.runs_the_model:
        refuse_idle(
            running.given,
            "with a number for `alpha`, no reset and no refit",
            f"pass {USES_OF_CALIBRATION}",
        )
    if asked.runs_the_model and running.calibration is None:
        raise ValueError(
            asked.without_calibration(
                "Pass as `calibration` a JSONL file with prompts and responses as in SFT"
            )
        )
    if asked.refit is not None and running.compute_dtype == "float16":
        raise ValueError(
            'Expected `compute_dtype` to be "float32" or "bfloat16" with `refit` but got "float16", whose gradients '
            "underflow."
        )
    if asked.runs_the_model:
        check_device(running.device)


def refuse_idle(names: Sequence[str], beside: str, instead: str) -> None:
    """Refuse options that would have no effect.

    Args:
        names: the options that were given; none is fine.
        beside: what they would have no effect beside, for the message.
        instead: what to do if they are to have one, for the message.

    Raises:
        ValueError: all of them are named.
    """
    if names:
        listed = ", ".join(f"`{name}`" for name in names)
        raise ValueError(
            f"Expected no {listed} {beside}: it would have no effect. Leave it out, or {instead}."
        )


def check_seed(asked: Options, dtypes: Iterable[torch.dtype]) -> None:
    """Refuse a seed that nothing would be drawn with.

    Args:
        asked: the options of the method.
        dtypes: of the output's tensors.

    Raises:
        ValueError: no model is run, and no tensor is rounded stochastically.
    """
    found = set(dtypes)
    drawn = asked.rounding == "stochastic" and not HALF_TYPES.isdisjoint(found)
    if asked.seed and not asked.runs_the_model and not drawn:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise ValueError(
            f'Expected no `seed` with `rounding="{asked.rounding}"` to {names}: nothing is drawn at random, it would '
            "have no effect. Leave it out."
        )


def applied(
    asked: Options, running: Running, dtype: str | None, dtypes: Iterable[torch.dtype]
) -> dict[str, Any]:
    """Return the options as the report has them: None for what nothing was done with.

    Args:
        asked: the options of the method.
        running: how models were run.
        dtype: what was asked for; None for the checkpoint's own.
        dtypes: of the output's tensors.
    """
    options = {**asdict(asked), "dtype": dtype, **asdict(running), "calibration": str(running.calibration)}
    del options["optimizer_state"]  # a checkpoint on disk has none
    models = () if asked.runs_the_model else tuple(field.name for field in fields(running))
    exact = ("rounding",) if HALF_TYPES.isdisjoint(dtypes) else ()
    return {**options, **dict.fromkeys((*models, *exact))}
