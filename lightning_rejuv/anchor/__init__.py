"""The base's weights: from wherever they lie, tensor by tensor, matched with a model's parameters."""

from lightning_rejuv.anchor.anchor import Anchor, AnchorSource
from lightning_rejuv.anchor.match import match

__all__ = ["Anchor", "AnchorSource", "match"]
