"""Restore the plasticity of an over-trained language model between SFT and RL."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rejuv.anchor import Anchor
    from lightning_rejuv.apply_plan import RejuvenationError
    from lightning_rejuv.callbacks import PlasticityCallback, RejuvenationCallback
    from lightning_rejuv.config import Refit, Reset
    from lightning_rejuv.metrics import PlasticityMonitor
    from lightning_rejuv.rejuvenate import rejuvenate
    from lightning_rejuv.report.report import RejuvenationReport

    __version__: str

__all__ = [
    "Anchor",
    "PlasticityCallback",
    "PlasticityMonitor",
    "Refit",
    "RejuvenationCallback",
    "RejuvenationError",
    "RejuvenationReport",
    "Reset",
    "__version__",
    "rejuvenate",
]

# Where each name is defined. It is imported at its first use: torch, Lightning and torchmetrics take seconds, and
# `lightning-rejuv --help` needs none of them, functions on checkpoints only the first.
_LATER = {
    "Anchor": "lightning_rejuv.anchor",
    "PlasticityCallback": "lightning_rejuv.callbacks",
    "PlasticityMonitor": "lightning_rejuv.metrics",
    "Refit": "lightning_rejuv.config",
    "Reset": "lightning_rejuv.config",
    "RejuvenationCallback": "lightning_rejuv.callbacks",
    "RejuvenationError": "lightning_rejuv.apply_plan",
    "RejuvenationReport": "lightning_rejuv.report.report",
    "rejuvenate": "lightning_rejuv.rejuvenate",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    if name == "__version__":
        return _version()
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "callbacks", "functional", "checkpoints", "metrics"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lightning-rejuv")
    except PackageNotFoundError:  # a source tree on the path that nothing installed
        return "0+unknown"


class _Package(ModuleType):
    """This package, in which `rejuvenate` is the function and never the submodule that defines it.

    The import system binds a submodule to its package under the submodule's name, whoever imports it and
    whenever: `from lightning_rejuv import rejuvenate` would then give a module that cannot be called.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rejuvenate" and isinstance(value, ModuleType):
            value = value.rejuvenate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
