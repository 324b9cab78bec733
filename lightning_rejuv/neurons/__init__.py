"""Which rows and columns of which tensors are one neuron."""

from lightning_rejuv.neurons.decoder import Decoder, find_decoder
from lightning_rejuv.neurons.generic import output_rows
from lightning_rejuv.neurons.group import NeuronGroup

__all__ = ["Decoder", "NeuronGroup", "find_decoder", "output_rows"]
