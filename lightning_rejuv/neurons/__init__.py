"""Which rows and columns of which tensors are one neuron."""

from lightning_rejuv.neurons.decoder import Decoder, take_apart
from lightning_rejuv.neurons.group import NeuronGroup

__all__ = ["Decoder", "NeuronGroup", "take_apart"]
