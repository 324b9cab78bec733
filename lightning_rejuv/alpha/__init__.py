"""Which alpha is taken: the rule, what is measured for it between base and SFT model, and what is doubted."""

from lightning_rejuv.alpha.line import Sampler, Verifier, find_alpha
from lightning_rejuv.alpha.search import AlphaPoint, AlphaSearch, choose_alpha
from lightning_rejuv.config import USUAL_ALPHA

__all__ = ["USUAL_ALPHA", "AlphaPoint", "AlphaSearch", "Sampler", "Verifier", "choose_alpha", "find_alpha"]
