"""Tables can be read: by people who see no colour, in light and in dark, whatever stands in them."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest
from support.fake_engine import FakeEngine
from support.hostile import CORPUS, problems

from nbinfer.contract.units import human_bytes
from nbinfer.display.frame import badge, badges_html, frame_bundle
from nbinfer.display.style import COLOURS, STYLE
from nbinfer.session import Model, ps, session
from nbinfer.tables import table


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        ("Running", "ok", "Running"),
        ("Running: llama.cpp 0.3.36", "ok", "Running</span> llama.cpp 0.3.36"),
        ("Installing: downloading", "busy", "Installing</span> downloading"),
        ("Error: import failed", "error", "Error</span> import failed"),
        ("Not Installed", "off", "Not Installed"),
        ("never heard of", "off", "never heard of"),
    ],
)
def test_a_badge_is_a_word_and_a_colour(status: str, kind: str, words: str) -> None:
    assert f"nbinfer-{kind}" in badge(status)
    assert words in badge(status)


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS.keys())
def test_hostile_names_are_inert(text: str) -> None:
    rows = [{"name": text, "status": text, text: text}]
    assert problems(badges_html(rows), style=STYLE) == []
    data, _ = frame_bundle(pd.DataFrame(rows))
    assert problems(data["text/html"], style=STYLE) == []
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", data["text/plain"])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1023.9 * 2**20, "1 GiB"),
        (3.2 * 2**30, "3.2 GiB"),
        (5 * 2**50, "5.12e+03 TiB"),
    ],
)
def test_bytes_are_readable(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_columns_are_shown_by_their_meaning() -> None:
    frame = pd.DataFrame(
        {"load_seconds": [0.5], "size_bytes": [2**30], "status": ["Running"], "note": [None]}
    )
    page = frame_bundle(frame)[0]["text/html"]
    assert "<th>load seconds</th><th>size</th><th>status</th><th>note</th>" in page
    assert "<td>1 GiB</td>" in page
    assert page.endswith("<td></td></tr></table></div>")
    missing = pd.DataFrame({"size_bytes": pd.array([None], dtype="Int64"), "at": [pd.NaT]})
    assert frame_bundle(missing)[0]["text/html"].count("<td></td>") == 2


@pytest.mark.parametrize(
    ("advice", "command", "remark"),
    [
        ("pip install 'nbinfer[images]'", "pip install &#x27;nbinfer[images]&#x27;", ""),
        (
            "CXXFLAGS='-fno-dse -O' pip install --no-deps x  # builds it",
            "CXXFLAGS=&#x27;-fno-dse -O&#x27; pip install --no-deps x",
            "  # builds it",
        ),
        ("pip install a\nOr use <a file>.", "pip install a", "<br>Or use &lt;a file&gt;."),
        ('$env:A="-D=on"; pip install a', "$env:A=&quot;-D=on&quot;; pip install a", ""),
        ("put llama-server on the PATH", None, ""),
    ],
)
def test_a_command_in_advice_is_code_and_reads_as_it_is_typed(
    advice: str, command: str | None, remark: str
) -> None:
    page = badges_html([{"install": advice}])
    code = [re.sub("</?span>", "", found) for found in re.findall("<code>(.*?)</code>", page)]
    assert code == ([] if command is None else [command])
    if command is not None:
        assert f"</code>{remark}</td>" in page


def test_loaded_models_are_shown_in_columns_that_fit_a_page() -> None:
    engine = Model(engine=FakeEngine(), name="fake", backend="llamacpp")
    session.add(engine)
    try:
        loaded = ps()
    finally:
        engine.unload()
    assert loaded.shape == (1, 12)
    data, _ = frame_bundle(loaded)
    heads = re.findall("<th>(.*?)</th>", data["text/html"])
    assert heads == ["name", "mode", "runs", "context", "requests", "tokens", "memory"]
    assert re.search("fake completion llamacpp, kernel 0 of 512 +idle +0", data["text/plain"])
    del loaded["waiting"]
    assert "load seconds" in frame_bundle(loaded)[0]["text/html"]


def test_models_are_shown_in_columns_that_fit_a_page() -> None:
    rows: list[dict[str, Any]] = [
        {
            "name": "tiny",
            "ref": "hf:a/tiny",
            "source": "huggingface",
            "architecture": "llama",
            "parameters": 7_241_732_096,
            "quantisation": "Q4_K",
            "size_bytes": 2**32,
            "disk_bytes": 2**32,
            "context": 131072,
            "modes": "completion",
            "verdict": "tight",
            "problem": "",
        },
        {"name": "b", "ref": "ollama:b", "source": "ollama", "size_bytes": 1, "problem": "a file is missing"},
    ]
    data, _ = frame_bundle(table("models", rows, list(rows[0])))
    cells = re.findall("<td>(.*?)</td>", data["text/html"])
    words = "hf:a/tiny huggingface llama 7.24 B Q4_K 4 GiB 131,072 completion tight"
    assert " ".join(cells[:9]) == words
    assert cells[9:] == ["ollama:b", "ollama", "", "", "", "1 B", "", "", "a file is missing"]


def test_lines_of_a_text_stay_lines() -> None:
    frame = pd.DataFrame({"install": ["pip install x\nor <b>y</b>"]})
    assert "</code><br>or &lt;b&gt;y&lt;/b&gt;</td>" in frame_bundle(frame)[0]["text/html"]


def test_an_empty_table_says_so() -> None:
    assert "Nothing to show" in frame_bundle(pd.DataFrame(columns=["name"]))[0]["text/html"]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("background", ["#ffffff", "#1e1e1e", "#111111"])
@pytest.mark.parametrize("name", COLOURS)
def test_fallback_colours_can_be_read_on_light_and_dark(name: str, background: str) -> None:
    low, high = sorted((luminance(COLOURS[name][1]), luminance(background)))
    assert (high + 0.05) / (low + 0.05) > 3.6


def test_the_style_sheet_touches_nothing_else_and_loads_nothing() -> None:
    sheet = STYLE.removeprefix("<style>").removesuffix("</style>")
    for rule in re.findall(r"([^{}]+)\{", sheet):
        for selector in rule.split(","):
            assert selector.startswith(".nbinfer")
    assert not re.search(r"url\(|@import|<", sheet)
    # Every colour follows the theme; a bare one would be wrong in the other theme.
    bare = re.sub(r"var\(--jp-[^()]*(\([^()]*\))?\)", "", sheet)
    assert not re.search(r"#[0-9a-f]{3}|rgb", bare)
    assert len(STYLE) < 3500
