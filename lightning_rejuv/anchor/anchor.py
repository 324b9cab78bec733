"""The anchor: the checkpoint that a model is pulled back toward, read tensor by tensor."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

AnchorSource: TypeAlias = "Anchor | nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]"


class Anchor(ABC):
    """A checkpoint's tensors by canonical name, each read only when it is asked for.

    Use :meth:`Anchor.open`; any checkpoint may be the anchor: the pretrained base, or an earlier epoch.

    >>> anchor = Anchor.open({"weight": torch.ones(2, 3)})
    >>> anchor.names(), tuple(anchor.shape("weight"))
    (['weight'], (2, 3))
    >>> anchor.end_tokens  # a state dict does not say with which tokens its model ends a response
    ()
    """

    @staticmethod
    def open(source: AnchorSource, prefix: str = "") -> Anchor:
        """Open the anchor that a module, a mapping or a path holds.

        Args:
            source: a module; a state dict; a Hugging Face directory (``model.safetensors``, sharded or
                not); a ``torch.distributed.checkpoint`` folder; a ``.safetensors`` file; a Lightning
                checkpoint or another file that ``torch.load(weights_only=True)`` can read, with a state dict or with
                several by name (``{"model": …, "optimizer": …}``). Files are memory-mapped. A folder with
                ``.metadata`` is opened as a distributed checkpoint only if it holds no ``*.safetensors``, index
                of such or ``config.json``; to open one that lies beside these, pass the path of its ``.metadata``.
                A ``~`` at the start of a path is the user's home directory.
            prefix: the prefix of the names of the model that is meant, if a checkpoint holds several: ``"ref."`` for a
                reference beside a policy. A path may end with it too, as a YAML file needs it:
                ``last.ckpt::ref.``.

        Raises:
            FileNotFoundError: the path, or a shard that its index names, does not exist.
            ValueError: the path holds no weights that can be read safely, or none under the prefix.
            TypeError: ``source`` is none of the above.
        """
        from lightning_rejuv.anchor.sources import open_anchor  # the sources are anchors themselves

        return open_anchor(source, prefix)

    def read_as(self, model: nn.Module) -> Anchor:
        """Return this anchor with the names and layouts that a model's own tensors have.

        The tensors of a directory may have others (experts one by one, older names); they are read as transformers
        would load them into the model. An anchor in memory usually has the model's already.
        """
        return self

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The ``config.json`` beside the tensors, if there is one."""
        return None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens with which its model ends a response; empty if nothing beside the tensors names them."""
        return ()

    @property
    @abstractmethod
    def description(self) -> str:
        """Where the tensors come from, for messages and reports."""

    @abstractmethod
    def names(self) -> list[str]:
        """All tensors' canonical names."""

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """A tensor's shape, without reading the tensor."""

    def dtype(self, name: str) -> torch.dtype | None:
        """A tensor's dtype; None if it is not known before the tensor is read."""
        return None

    def held(self) -> Iterable[tuple[str, Tensor]]:
        """The tensors that lie in memory before they are asked for, by name."""
        return ()

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A tensor, on the device where it lies (the CPU for files). Never to be written to."""
