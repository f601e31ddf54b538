"""What a family of targets is: machines whose code is built alike and differs by features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import ClassVar


class Family(ABC):
    """Machines of one kind.

    `features` are all that a target of this family may name, in the order in which they are
    printed; no two families share one. `targets` are named sets of them. `platforms` are the names
    that `platform.machine` gives machines of this family. Which flags of a compiler stand for a
    feature is known to the backends. `device` is "cpu" for processors, and "gpu" for what a
    processor hands its work to: only a driver can tell which of those a machine has.
    """

    name: ClassVar[str]
    features: ClassVar[tuple[str, ...]]
    targets: ClassVar[Mapping[str, tuple[str, ...]]]
    platforms: ClassVar[tuple[str, ...]] = ()
    device: ClassVar[str] = "cpu"

    @abstractmethod
    def detect(self) -> frozenset[str]:
        """The features that this machine has; TargetError where it cannot be told.

        Only called on a machine of this family.
        """

    @abstractmethod
    def native(self, here: Collection[str]) -> list[str]:
        """What `native` stands for on a machine of these features: a target, and extras.

        Raises TargetError where they are less than infc builds for.
        """

    def check(self, base: str, features: Collection[str], text: str) -> None:
        """Raises TargetError where no machine has these features, which `text` named.

        `base` is the named target that others were added to. By default all can be combined.
        """
        return
