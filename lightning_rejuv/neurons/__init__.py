"""Which rows and columns of which tensors are one neuron."""

from lightning_rejuv.neurons.decoder import Decoder, take_apart
from lightning_rejuv.neurons.generic import output_rows
from lightning_rejuv.neurons.group import NeuronGroup

__all__ = ["Decoder", "NeuronGroup", "output_rows", "take_apart"]
