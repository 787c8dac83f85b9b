"""Runtime flags: what is on the list, and what no list can allow."""

from __future__ import annotations

from typing import Any

import pytest

from nbinfer.contract.errors import ConfigError
from nbinfer.contract.flags import check_flag_items, check_flags

ALLOWED = frozenset({"--threads", "-t", "--seed", "--temp", "--mlock", "--tensor-split", "--no-mmap", "-fa"})


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--mlock"],
        ["--threads", "4"],
        ["--threads=4"],
        ["-t", "4", "--mlock"],
        ["--seed", "-1"],
        ["--seed=-1"],
        ["--temp", "-0.5"],
        ["--temp", "-.5e-3"],
        ["--temp=-1."],
        ["--tensor-split", "3,1"],
        ["--no-mmap", "-fa", "on"],
        ["--threads="],
        ["--threads", ""],
        ["--seed=a=b"],
        ["--threads", "\u00fc"],
    ],
)
def test_flags_that_are_allowed(flags: list[str]) -> None:
    assert check_flags(flags, ALLOWED) == tuple(flags)
    assert check_flags(tuple(flags), ALLOWED) == tuple(flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--thread", "4"], ["'--thread'", "llamacpp", "--threads"]),
        (["--THREADS", "4"], ["'--THREADS'"]),
        (["--parallel=4"], ["'--parallel'"]),
        (["-t4"], ["'-t4'"]),
        (["--no_mmap"], ["'--no_mmap'", "--no-mmap"]),
        (["--mlock", "--nope"], ["'--nope'"]),
    ],
)
def test_a_flag_off_the_list_is_refused_and_the_nearest_is_named(flags: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_flags(flags, ALLOWED, backend="llamacpp")
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_backend_without_a_list_takes_no_flags() -> None:
    assert check_flags([], ()) == ()
    with pytest.raises(ConfigError, match="takes no flags"):
        check_flags(["--threads", "4"], ())


@pytest.mark.parametrize(
    "flag",
    [
        "--log-file",
        "--host",
        "--port",
        "--model-path",
        "--slot-save-path",
        "--lookup-cache-file",
        "--ssl-keyfile",
        "--ssl_certfile",
        "--download-dir",
        "--model-url",
        "--uds",
        "--api-key-file",
        "--trust-remote-code",
        "--trust_remote_code",
        "--Trust-Remote-Code",
        "--log-file=x",
        "--port=8080",
    ],
)
def test_places_and_remote_code_are_refused_even_when_a_list_has_them(flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_flags([flag], {flag.partition("=")[0]})
    assert flag.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--threads", "/etc/passwd"],
        ["--threads=/etc/passwd"],
        ["--threads", "a/b"],
        ["--threads", "a\\b"],
        ["--threads=http://x"],
        ["--threads", ".."],
        ["--threads", "~root"],
        ["--threads", "a\nb"],
        ["--threads", "a\x00"],
        ["--threads=--mlock"],
        ["--threads=-x"],
        ["-"],
        ["--"],
        ["--=x"],
        ["stray"],
        ["-1"],
        ["--threads", "4", "stray"],
        ["--threads=4", "stray"],
    ],
)
def test_values_that_are_refused_for_every_backend(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="runtime-flags"):
        check_flags(flags, ALLOWED)
    with pytest.raises(ConfigError, match="runtime-flags"):
        check_flag_items(flags)


@pytest.mark.parametrize(
    "flags", ["--threads 4", "", None, 4, {"--threads": "4"}, {"--threads"}, ["--threads", 4], [None]]
)
def test_only_a_list_of_strings_is_a_list_of_flags(flags: Any) -> None:
    with pytest.raises(ConfigError, match="string"):
        check_flag_items(flags)


def test_a_long_item_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        check_flags(["--" + "x" * 10_000], ALLOWED)
    assert len(str(caught.value)) < 300
