"""What estimates of every kind have in common: their devices' parts, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pandas as pd

    from nbinfer.contract.memory import RequiredMemory

Verdict: TypeAlias = Literal["fits", "tight", "does not fit"]
VERDICTS: tuple[Verdict, ...] = ("fits", "tight", "does not fit")

FORMULA = "formula"


@dataclass(frozen=True, slots=True)
class Advice:
    """A change that makes it fit: in words, and as options of ``nb.load`` and ``nb.estimate``."""

    text: str
    changes: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Bytes on one device; a kind of model adds its parts, and names them in ``PARTS``.

    Attributes
    ----------
    name, kind
        ``RAM`` or the GPU's name; ``ram`` or ``gpu``.
    overhead
        Least and most of what is known only roughly.
    available, total
        What is free now, and what there is.
    """

    PARTS: ClassVar[tuple[str, ...]] = ()

    name: str
    kind: Literal["ram", "gpu"]
    overhead: tuple[int, int] = (0, 0)
    available: int = 0
    total: int = 0

    @property
    def known(self) -> int:
        """The parts together, without overhead."""
        return sum(getattr(self, part) for part in self.PARTS)

    @property
    def required(self) -> int:
        """The parts and the middle of the overhead."""
        return self.known + sum(self.overhead) // 2

    @property
    def counted(self) -> int:
        """Of the parts, what an engine says of itself that it holds."""
        return self.known

    @property
    def working(self) -> int:
        """Of the parts, the buffers to compute in: main memory gives them when they are first written to."""
        return 0

    def rows(self) -> Iterator[tuple[str, int, str]]:
        """Yield each part with its bytes and where that number comes from."""
        for part in self.PARTS:
            yield part, getattr(self, part), FORMULA

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON-able values; sizes in bytes."""
        return {
            "name": self.name,
            "kind": self.kind,
            **{part: getattr(self, part) for part in self.PARTS},
            "overhead": list(self.overhead),
            "required": self.required,
            "available": self.available,
            "total": self.total,
        }


AnyDevice_co = TypeVar("AnyDevice_co", bound=Device, covariant=True)


class Shown(Generic[AnyDevice_co]):
    """An estimate: it prints itself as a table, shows itself as bars, and gives itself as values."""

    if TYPE_CHECKING:

        @property
        def model(self) -> str:
            """Its name."""

        @property
        def devices(self) -> tuple[AnyDevice_co, ...]:
            """What lies where."""

        @property
        def required(self) -> RequiredMemory:
            """Bytes to set aside."""

        @property
        def verdict(self) -> Verdict:
            """Whether it fits."""

        @property
        def reason(self) -> str:
            """The verdict in words."""

        @property
        def asked(self) -> str:
            """The settings in words."""

        @property
        def note(self) -> str:
            """What is doubtful about it."""

        @property
        def exact(self) -> bool:
            """Whether the engine itself was asked."""

        def advice(self) -> tuple[Advice, ...]:
            """Return the changes that make it fit."""

    def to_frame(self) -> pd.DataFrame:
        """One row per device and part: device, part, bytes, source."""
        import pandas as pd

        rows = [
            {"device": device.name, "part": part, "bytes": size, "source": source}
            for device in self.devices
            for part, size, source in device.rows()
            if size
        ]
        return pd.DataFrame(rows, columns=["device", "part", "bytes", "source"])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON-able values; sizes in bytes."""
        return {
            "model": self.model,
            "verdict": self.verdict,
            "reason": self.reason,
            "exact": self.exact,
            **self._own_values(),
            "required": {"ram": self.required.ram, "vram": list(self.required.vram)},
            "devices": [device.to_dict() for device in self.devices],
            "advice": [{"text": one.text, "changes": dict(one.changes)} for one in self.advice()],
        }

    def _own_values(self) -> dict[str, Any]:
        """What only this kind of estimate says of itself, as plain values."""
        return {}

    def __str__(self) -> str:
        from nbinfer.memory.show import text

        return text(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model}: {self.reason}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        from nbinfer.memory.show import html, text

        del include, exclude
        return {"text/plain": text(self), "text/html": html(self)}
