"""Pictures: what is drawn, in both themes, and the same in words where nothing can be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from support.frames import embedding_model
from support.hostile import CORPUS
from support.notebook import notebook

import nbinfer as nb
from nbinfer import plots
from nbinfer.contract.errors import BackendUnavailable, ConfigError, RequestError
from nbinfer.memory.show import COLOURS

if TYPE_CHECKING:
    from pathlib import Path

PNG = b"\x89PNG"


def shown(picture: plots.Picture) -> tuple[dict[str, Any], dict[str, Any]]:
    data, metadata = picture._repr_mimebundle_()
    return data, metadata


@pytest.fixture(scope="module")
def plan() -> Any:
    return nb.estimate("demo", gpus=["1GiB"], ram="2GiB", exact=False)


@pytest.fixture
def bench() -> pd.DataFrame:
    rows = [
        {
            "parallel": level,
            "run": run,
            "tokens_per_second": 100.0 * level + run,
            "prompt_tokens_per_second": 1000.0,
            "first_token_seconds": 0.01 * level,
        }
        for level in (1, 2, 4)
        for run in (1, 2, 3)
    ]
    frame = pd.DataFrame(rows)
    frame.attrs["model"] = "demo"
    return frame


@pytest.fixture
def notes() -> pd.DataFrame:
    vectors = np.array([[1, 0, 0, 0.1], [0.9, 0.1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], np.float32)
    return pd.DataFrame(
        {"text": ["one", "almost one", "two", "three"], "kind": list("aabc"), "v": list(vectors)}
    )


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _name: None)


def texts(picture: plots.Picture) -> list[str]:
    """Every word of a picture."""
    assert picture.figure is not None
    from matplotlib.text import Text

    found: list[Any] = picture.figure.findobj(Text)
    return [each.get_text() for each in found]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("background", ["#ffffff", "#1e1e1e", "#111111"])
@pytest.mark.parametrize("colour", [plots.INK, *plots._VERDICT_COLOURS.values(), plots.GROUPS[1]])
def test_words_can_be_read_on_light_and_dark(colour: str, background: str) -> None:
    low, high = sorted((luminance(colour), luminance(background)))
    assert (high + 0.05) / (low + 0.05) > 3.3


@pytest.mark.parametrize("background", ["#ffffff", "#1e1e1e", "#111111"])
@pytest.mark.parametrize("colour", [*COLOURS.values(), *plots.GROUPS])
def test_bars_and_points_can_be_seen_on_light_and_dark(colour: str, background: str) -> None:
    low, high = sorted((luminance(colour), luminance(background)))
    assert (high + 0.05) / (low + 0.05) > 2.5


def test_a_sweep_is_drawn_by_part_against_what_is_free(plan: Any) -> None:
    picture = nb.plot_sweep(plan, context_size=[256, 512], kv_type=["f16", "q8_0"])
    again = plan.again(context_size=512, kv_type="q8_0", exact=False)
    row = picture.frame.query("context_size == 512 and kv_type == 'q8_0' and device == 'GPU 0'").iloc[0]
    assert row["cache_bytes"] == again.gpus[0].cache
    assert row["needed_bytes"] == again.gpus[0].required
    assert row["free_bytes"] == 1 << 30
    assert row["verdict"] == "fits"
    data, metadata = shown(picture)
    assert data["image/png"].startswith(PNG)
    assert set(data) == {"image/png", "text/plain"}
    assert metadata["image/png"]["alt"].startswith("Memory of demo by context_size and kv_type")
    words = texts(picture)
    assert {"kv_type = f16", "KV cache", "context_size", "512", "✓", "demo"} <= {*words}
    assert any(word.split()[:2] == ["1", "GiB"] for word in words)


def test_each_bar_says_its_verdict_in_a_sign() -> None:
    tiny = nb.estimate("demo", gpus=["60MiB"], exact=False)
    picture = nb.plot_sweep(tiny, gpu_layers=[0, -1])
    by_layers = picture.frame[picture.frame["device"] == "GPU 0"].set_index("gpu_layers")["verdict"]
    assert by_layers[-1] != "fits"
    assert plots._MARKS[by_layers[-1]] in texts(picture)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, "one or two options"),
        ({"context_size": 512}, "context_size=512 is not a list"),
        ({"kv_type": "f16"}, "kv_type='f16' is not a list"),
        ({"context_size": []}, r"context_size=\[\] is not a list"),
        ({"context_size": [1], "parallel": [1], "kv_type": ["f16"]}, "one or two options"),
    ],
)
def test_what_cannot_be_swept_is_refused(plan: Any, options: dict[str, Any], part: str) -> None:
    with pytest.raises(RequestError, match=part):
        nb.plot_sweep(plan, **options)


def test_a_typing_mistake_is_named(plan: Any) -> None:
    with pytest.raises(ConfigError, match="Did you mean context_size"):
        nb.plot_sweep(plan, contextsize=[512])


def test_a_bench_is_drawn_as_medians(bench: pd.DataFrame) -> None:
    picture = nb.plot_bench(bench)
    assert picture.frame["tokens_per_second"].tolist() == [102.0, 202.0, 402.0]
    assert shown(picture)[0]["image/png"].startswith(PNG)
    assert {"demo", "requests at once", "writing (tokens/s)"} <= {*texts(picture)}


def test_several_benches_are_compared_by_name(bench: pd.DataFrame) -> None:
    picture = nb.plot_bench({"f16": bench, "q8_0": bench[bench["parallel"] < 4]})
    assert picture.frame.groupby("name", sort=False).size().to_dict() == {"f16": 3, "q8_0": 2}
    assert {"f16", "q8_0"} <= {*texts(picture)}


def test_another_table_is_no_bench() -> None:
    with pytest.raises(RequestError, match=r"no table of nb\.bench|not a table of nb\.bench"):
        nb.plot_bench(pd.DataFrame({"parallel": [1]}))
    with pytest.raises(RequestError, match="nothing to draw"):
        nb.plot_bench({})


def test_vectors_that_are_near_are_drawn_near(notes: pd.DataFrame) -> None:
    picture = nb.plot_similarity(notes, on="v", label="text", group="kind", query=[1.0, 0, 0, 0], k=2)
    xy = picture.frame[["x", "y"]].to_numpy()
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    assert distance[0, 1] < min(distance[0, 2], distance[0, 3], distance[2, 3])
    assert picture.frame["cosine"].idxmax() == 0
    assert picture.frame["label"].tolist() == notes["text"].tolist()
    assert shown(picture)[0]["image/png"].startswith(PNG)
    words = texts(picture)
    assert "query" in words
    assert [word for word in words if word in ("1.00", "0.99")]  # cosines of the two nearest
    assert any("principal components" in word and "%" in word for word in words)


def test_the_same_vectors_are_drawn_the_same(notes: pd.DataFrame) -> None:
    first, second = (nb.plot_similarity(notes, on="v").frame for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


def test_rows_without_a_vector_are_left_out(notes: pd.DataFrame) -> None:
    notes.loc[1, "v"] = None
    picture = nb.plot_similarity(notes, on="v", label="text")
    assert picture.frame["label"].tolist() == ["one", "two", "three"]
    notes.loc[2, "v"] = None
    with pytest.raises(RequestError, match="three rows"):
        nb.plot_similarity(notes, on="v")


def test_a_text_is_embedded_to_be_asked() -> None:
    model = embedding_model()
    notes = nb.embed(pd.DataFrame({"text": ["a", "b", "c", "d"]}), on="text", model=model, progress=False)
    picture = nb.plot_similarity(notes, on="embedding", label="text", query="a", model=model)
    assert picture.frame["cosine"][0] == pytest.approx(1.0, abs=1e-5)
    assert "a" in texts(picture)


def test_of_many_groups_the_largest_have_a_colour() -> None:
    vectors = np.random.default_rng(2).normal(size=(100, 4)).astype(np.float32)
    kinds = ["big"] * 40 + [f"kind {i}" for i in range(60)]
    picture = nb.plot_similarity(pd.DataFrame({"v": list(vectors), "kind": kinds}), on="v", group="kind")
    assert {"big", "others"} <= {*texts(picture)}
    assert len([word for word in texts(picture) if word.startswith("kind ")]) == 11


def test_labels_do_not_cover_each_other() -> None:
    from matplotlib.text import Annotation

    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    frame = pd.DataFrame({"v": list(vectors), "text": [f"a label of row {i}" for i in range(300)]})
    picture = nb.plot_similarity(frame, on="v", label="text")
    assert picture.figure is not None
    written: list[Any] = picture.figure.findobj(Annotation)
    boxes = [each.get_window_extent() for each in written]
    assert len(boxes) > 5
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_hostile_names_are_drawn_as_they_are(notes: pd.DataFrame, bench: pd.DataFrame) -> None:
    many = [text.replace("\n", " ") for text in CORPUS.values()] + ["$\\frac{", "日本語 🎉", "\x1b[2J"]
    frame = pd.DataFrame({"v": list(np.random.default_rng(1).normal(size=(len(many), 5)).astype(np.float32))})
    picture = nb.plot_similarity(
        frame.assign(text=many, kind=many), on="v", label="text", group="kind", query=[1.0] * 5
    )
    assert shown(picture)[0]["image/png"].startswith(PNG)
    assert "\x1b" not in shown(picture)[0]["text/plain"]
    assert shown(nb.plot_bench({"$\\frac{": bench, "b\x1b": bench}))[0]["image/png"].startswith(PNG)


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_the_numbers_are_a_table(
    plan: Any, bench: pd.DataFrame, notes: pd.DataFrame
) -> None:
    hostile = notes.assign(text=["<script>x</script>", *notes["text"][1:]])
    pictures = [
        nb.plot_sweep(plan, context_size=[256, 512]),
        nb.plot_bench(bench),
        nb.plot_similarity(hostile, on="v", label="text", query=[1.0, 0, 0, 0]),
    ]
    for picture in pictures:
        data, _ = shown(picture)
        assert set(data) == {"text/plain", "text/html"}
        assert "<table>" in data["text/html"]
        assert "<script" not in data["text/html"]
        assert "nbinfer[plots]" in data["text/html"]
        with pytest.raises(BackendUnavailable, match="matplotlib"):
            picture.save("x.png")
    assert "GiB" in repr(pictures[0])


def test_a_picture_is_saved_in_the_kind_that_its_name_says(bench: pd.DataFrame, tmp_path: Path) -> None:
    picture = nb.plot_bench(bench)
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_drawing_leaves_matplotlib_as_it_was(bench: pd.DataFrame) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    before = dict(mpl.rcParams)
    shown(nb.plot_bench(bench))
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []


def test_a_cell_shows_the_picture_and_folds_its_numbers(bench: pd.DataFrame) -> None:
    with notebook() as opened:
        opened.set(picture=nb.plot_bench(bench))
        opened.run("picture")
        picture, numbers = opened.outputs
    assert set(picture["data"]) == {"image/png", "text/plain"}
    assert picture["metadata"]["image/png"]["width"] > 100
    assert "<summary>Speed of demo" in numbers["data"]["text/html"]
    assert "402" in numbers["data"]["text/plain"]
