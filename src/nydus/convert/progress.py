"""What a conversion tells of itself while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(slots=True)
class LayerProgress:
    """How far one layer is; bytes.

    Attributes:
        number: counts from 1.
        size: of the source layer as it is stored.
        state: ``waiting``, ``working``, ``done`` or ``failed``.
        downloaded: of ``size``.
        built: of the Nydus blob until now.
        uploaded: of ``built``.
        reused: the target had it before, so nothing had to be done.
    """

    number: int
    digest: str
    size: int
    state: str = "waiting"
    downloaded: int = 0
    built: int = 0
    uploaded: int = 0
    reused: bool = False


class Verb(NamedTuple):
    """What is done with layers: in words, while it is done, when it is, and where it need not be.

    ``sends``: they also go somewhere.
    """

    doing: str
    done: str
    kept: str
    sends: bool = True


CONVERT = Verb("converting", "converted", "reused")
COPY = Verb("copying", "copied", "found")
CHECK = Verb("checking", "read", "read", sends=False)


class Progress(Protocol):
    """Receives the course of a conversion; every method returns at once and raises nothing."""

    def note(self, message: str, **fields: object) -> None:
        """A step began or ended."""

    def layers(self, layers: Sequence[LayerProgress], verb: Verb = CONVERT) -> None:
        """This will be done with these layers; the objects change while it is."""

    def changed(self, layer: LayerProgress) -> None:
        """A layer has got further."""


class Silent:
    """Says nothing."""

    def note(self, message: str, **fields: object) -> None:
        pass

    def layers(self, layers: Sequence[LayerProgress], verb: Verb = CONVERT) -> None:
        pass

    def changed(self, layer: LayerProgress) -> None:
        pass
