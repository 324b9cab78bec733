"""The paper's quantity: what every neuron contributes to the logit of the target token."""

from lightning_rejuv.attribution.target_logit.attribute import attribute, check_reconstruction

__all__ = ["attribute", "check_reconstruction"]
