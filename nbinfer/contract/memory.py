"""How much memory a model needs, per device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from nbinfer.contract.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RequiredMemory:
    """Bytes of RAM and of each GPU's memory.

    Parameters
    ----------
    ram
        Bytes of main memory.
    vram
        Bytes on each GPU, in the order of the devices; empty when no GPU is used.
    """

    ram: int = 0
    vram: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "vram", tuple(self.vram))
        values: list[tuple[str, object]] = [("ram", self.ram)]
        values += [(f"vram[{i}]", amount) for i, amount in enumerate(self.vram)]
        for name, value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r} is refused: it is a whole number of bytes, 0 or more.")

    @property
    def total_vram(self) -> int:
        """Bytes on all GPUs together."""
        return sum(self.vram)

    def __add__(self, other: object) -> RequiredMemory:
        if not isinstance(other, RequiredMemory):
            return NotImplemented
        vram = tuple(a + b for a, b in zip_longest(self.vram, other.vram, fillvalue=0))
        return RequiredMemory(self.ram + other.ram, vram)

    def fits(self, free: RequiredMemory) -> bool:
        """Whether ``free`` has room for this on every device."""
        pairs = zip_longest(self.vram, free.vram, fillvalue=0)
        return self.ram <= free.ram and all(needed <= there for needed, there in pairs)

    def to_json(self) -> dict[str, Any]:
        """Return the wire form, ``{"ram": bytes, "vram": [bytes, …]}``."""
        return {"ram": self.ram, "vram": list(self.vram)}

    @classmethod
    def from_json(cls, value: object) -> RequiredMemory:
        """Read the wire form; a missing member is 0 bytes.

        Raises
        ------
        ConfigError
            It is not an object with ``ram`` and ``vram``, or a number is not one of bytes.
        """
        if not isinstance(value, dict) or not isinstance(value.get("vram", []), list):
            raise ConfigError(
                'memory is refused: it is an object {"ram": bytes, "vram": [bytes of each GPU, …]}.'
            )
        return cls(value.get("ram", 0), tuple(value.get("vram", [])))
