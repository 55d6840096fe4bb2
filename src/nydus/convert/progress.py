"""What a conversion tells of itself while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(slots=True)
class LayerProgress:
    """How far one layer is; bytes.

    Attributes:
        number: counts from 1.
        size: of the source layer as it is stored.
        state: ``waiting``, ``converting``, ``done`` or ``failed``.
        downloaded: of ``size``.
        built: of the Nydus blob until now.
        uploaded: of ``built``.
        reused: it was converted before, so nothing had to be done.
    """

    number: int
    digest: str
    size: int
    state: str = "waiting"
    downloaded: int = 0
    built: int = 0
    uploaded: int = 0
    reused: bool = False


class Progress(Protocol):
    """Receives the course of a conversion; every method returns at once and raises nothing."""

    def note(self, message: str, **fields: object) -> None:
        """A step began or ended."""

    def layers(self, layers: Sequence[LayerProgress]) -> None:
        """These layers will be converted; the objects change while they are."""

    def changed(self, layer: LayerProgress) -> None:
        """A layer has got further."""


class Silent:
    """Says nothing."""

    def note(self, message: str, **fields: object) -> None:
        pass

    def layers(self, layers: Sequence[LayerProgress]) -> None:
        pass

    def changed(self, layer: LayerProgress) -> None:
        pass
