"""Alpha by tensor name, from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def given_alpha(alpha: float | str | Mapping[str, float]) -> Any:
    """Return an alpha as it was given, or if that is the path of a YAML file, what the file holds.

    >>> given_alpha(0.4)
    0.4
    """
    if isinstance(alpha, str) and alpha.endswith((".yaml", ".yml")):
        return read_alphas(Path(alpha).expanduser())
    return alpha


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
