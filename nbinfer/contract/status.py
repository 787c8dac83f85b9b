"""Whether a backend can be used here, in four words and a detail."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class StatusWord(StrEnum):
    """The four words. ``Running`` means installed and usable here, not that a model is loaded."""

    RUNNING = "Running"
    ERROR = "Error"
    NOT_INSTALLED = "Not Installed"
    INSTALLING = "Installing"


# Details that several backends have in common are the same phrase everywhere.
BINARY_NOT_FOUND = "binary not found"
PACKAGE_NOT_INSTALLED = "package not installed"
IMPORT_FAILED = "import failed"
VERSION_UNKNOWN = "version unknown"
PYTHON_NOT_FOUND = "Python not found"
ONLY_LINUX = "only supported on Linux"
ONLY_APPLE_SILICON = "only supported on Apple Silicon"
DOWNLOADING = "downloading"
CHECKING_FOR_UPDATES = "checking for updates"


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """A status word and its detail; ``str(status)`` is the wire text.

    Parameters
    ----------
    word
        One of the four words.
    detail
        What a person should know, ``llama.cpp 0.3.36 (CPU)``; may be empty.
    """

    word: StatusWord
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.word.value}: {self.detail}" if self.detail else self.word.value

    @classmethod
    def parse(cls, text: str) -> BackendStatus:
        """Read a status text back; total, so that a newer program's words survive as an ``Error``.

        Empty text is ``Not Installed``; a word, or a word followed by ``": "`` and a detail, is its parts;
        any other text is ``Error`` with the whole text as the detail.
        """
        if not text:
            return cls(StatusWord.NOT_INSTALLED)
        for word in StatusWord:
            if text == word.value:
                return cls(word)
            prefix = f"{word.value}: "
            if text.startswith(prefix):
                return cls(word, text.removeprefix(prefix))
        return cls(StatusWord.ERROR, text)

    @property
    def usable(self) -> bool:
        """Whether a model can be loaded with this backend now."""
        return self.word is StatusWord.RUNNING
