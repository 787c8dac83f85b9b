"""Statuses: four words, a detail, and parsing that never fails."""

from __future__ import annotations

import pytest

from nbinfer.contract import status
from nbinfer.contract.status import BackendStatus, StatusWord

RUNNING, ERROR = StatusWord.RUNNING, StatusWord.ERROR
NOT_INSTALLED, INSTALLING = StatusWord.NOT_INSTALLED, StatusWord.INSTALLING


def test_the_four_words_are_fixed() -> None:
    assert [word.value for word in StatusWord] == ["Running", "Error", "Not Installed", "Installing"]


@pytest.mark.parametrize(
    ("text", "word", "detail"),
    [
        ("", NOT_INSTALLED, ""),
        ("Running", RUNNING, ""),
        ("Running: x", RUNNING, "x"),
        ("Running: llama.cpp 0.3.36", RUNNING, "llama.cpp 0.3.36"),
        ("Running: a: b", RUNNING, "a: b"),
        ("Error: Running: x", ERROR, "Running: x"),
        ("Not Installed: only supported on Linux", NOT_INSTALLED, "only supported on Linux"),
        ("Installing: downloading", INSTALLING, "downloading"),
        ("Installing", INSTALLING, ""),
        ("Error", ERROR, ""),
        # Not a word, or not a word and ": " and a detail: an error with the whole text.
        ("running", ERROR, "running"),
        ("Running:x", ERROR, "Running:x"),
        ("Running x", ERROR, "Running x"),
        (" Running", ERROR, " Running"),
        ("Running ", ERROR, "Running "),
        ("RunningFast: x", ERROR, "RunningFast: x"),
        ("NotInstalled", ERROR, "NotInstalled"),
        ("Installed: x", ERROR, "Installed: x"),
        ("on fire", ERROR, "on fire"),
        (" ", ERROR, " "),
    ],
)
def test_parsing_splits_word_and_detail(text: str, word: StatusWord, detail: str) -> None:
    parsed = BackendStatus.parse(text)
    assert (parsed.word, parsed.detail) == (word, detail)


@pytest.mark.parametrize("word", list(StatusWord))
@pytest.mark.parametrize("detail", ["", "x", "Running: y", "llama.cpp 0.3.36 (CPU)", "zwei\nZeilen"])
def test_text_reads_back_as_the_same_status(word: StatusWord, detail: str) -> None:
    made = BackendStatus(word, detail)
    assert BackendStatus.parse(str(made)) == made


def test_the_text_is_the_word_alone_or_word_and_detail() -> None:
    assert str(BackendStatus(RUNNING)) == "Running"
    assert str(BackendStatus(RUNNING, "llama.cpp 0.3.36")) == "Running: llama.cpp 0.3.36"


def test_only_running_is_usable() -> None:
    assert [BackendStatus(word).usable for word in StatusWord] == [True, False, False, False]


def test_the_shared_details_are_the_same_phrases_everywhere() -> None:
    assert {
        status.BINARY_NOT_FOUND,
        status.PACKAGE_NOT_INSTALLED,
        status.IMPORT_FAILED,
        status.VERSION_UNKNOWN,
        status.PYTHON_NOT_FOUND,
        status.ONLY_LINUX,
        status.ONLY_APPLE_SILICON,
        status.DOWNLOADING,
        status.CHECKING_FOR_UPDATES,
    } == {
        "binary not found",
        "package not installed",
        "import failed",
        "version unknown",
        "Python not found",
        "only supported on Linux",
        "only supported on Apple Silicon",
        "downloading",
        "checking for updates",
    }
