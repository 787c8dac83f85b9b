"""Pictures where people would rather look than read: memory by setting, speed by load, vectors in the plane.

Drawn by matplotlib (the extra ``plots``) as PNG, because every front end shows one, also in a saved notebook
that it does not trust, and so do code hosts. The background is transparent and the colours are mid-tones, so
that a picture can be read in light and in dark themes. Without matplotlib the same call shows the numbers in
a table.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nbinfer.contract.errors import BackendUnavailable, RequestError
from nbinfer.contract.rendering import printable
from nbinfer.contract.units import human_bytes

if TYPE_CHECKING:
    import os

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from nbinfer.memory.estimate import Estimate

__all__ = ["Picture", "plot_bench", "plot_similarity", "plot_sweep"]

INSTALL = "pip install 'nbinfer[plots]'"

INK = "#7b7f86"
"""Of words and lines. Its contrast on white and on the dark themes' backgrounds is tested."""

GROUPS = ("#3b76c4", "#c8741a", "#3f8f4f", "#b0508a", "#8c6bb1", "#9a7413", "#2e8b8b", "#cc4b4b")
_VERDICT_COLOURS = {"fits": "#2f8a4c", "tight": "#b8622b", "does not fit": "#cc4b4b"}
_MARKS = {"fits": "✓", "tight": "!", "does not fit": "✗"}

_DPI = 96  # pixels of the page per inch of the figure; the file has twice as many, for sharp screens
_WORTH_A_PANEL = 0.05  # of what is free on a device
_NEAR = 2.5  # times the most that is needed: what is free beyond is words, not a line
_LABEL_LENGTH = 32
_MOST_LABELS = 60
_MOST_GROUPS = 12
_DOT = 4.0  # half of a point's width, in the figure's pixels
_FONTS = (
    "DejaVu Sans",
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans Devanagari"),
    *("Microsoft YaHei", "Hiragino Sans", "PingFang SC", "Arial Unicode MS"),
)


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture that shows itself in a notebook, and its numbers.

    Attributes
    ----------
    frame
        The numbers that are drawn; what a terminal shows, and what is shown without matplotlib.
    alt
        The picture in one sentence, for who cannot see it.
    figure
        The :class:`matplotlib.figure.Figure`, to be changed or saved; None without matplotlib.
    """

    frame: pd.DataFrame
    alt: str
    figure: Figure | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file; the name's end says what kind: ``.png``, ``.svg``, ``.pdf``.

        Raises
        ------
        BackendUnavailable
            matplotlib is not installed.
        """
        if self.figure is None:
            raise BackendUnavailable(f"pictures need matplotlib.\nInstall it: {INSTALL}")
        with _quietly():
            self.figure.savefig(Path(path), dpi=2 * _DPI, transparent=True)

    def __repr__(self) -> str:
        return f"{printable(self.alt)}\n{self._words()}"

    def _words(self) -> str:
        sizes = [c for c in self.frame.columns if str(c).endswith("_bytes")]
        words = self.frame.assign(**{c: self.frame[c].map(human_bytes) for c in sizes})
        return printable(words.round(3).to_string(index=False))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        del include, exclude
        if self.figure is None:
            return {
                "text/plain": repr(self),
                "text/html": self._table(f"{self.alt} As a picture: {INSTALL}"),
            }, {}
        data = io.BytesIO()
        with _quietly():
            self.figure.savefig(data, format="png", dpi=2 * _DPI, transparent=True)
        width, height = (round(inches * _DPI) for inches in self.figure.get_size_inches())
        shown = {"width": width, "height": height, "alt": printable(self.alt)}
        return {"text/plain": repr(self), "image/png": data.getvalue()}, {"image/png": shown}

    def _ipython_display_(self) -> None:
        """Show the picture, and below it its numbers: no front end hands on the words of a PNG."""
        from IPython.display import display

        data, metadata = self._repr_mimebundle_()
        if self.figure is None:
            display(data, raw=True)  # type: ignore[no-untyped-call]
            return
        picture = {**data, "text/plain": printable(self.alt)}
        display(picture, metadata=metadata, raw=True)  # type: ignore[no-untyped-call]
        numbers = {"text/plain": self._words(), "text/html": self._table(self.alt, folded=True)}
        display(numbers, raw=True)  # type: ignore[no-untyped-call]

    def _table(self, words: str, *, folded: bool = False) -> str:
        from nbinfer.display.frame import badges_html
        from nbinfer.display.style import page
        from nbinfer.display.text import escape

        table = badges_html(self.frame.round(3).to_dict("records"))  # type: ignore[arg-type]
        if folded:
            return page(f"<details><summary>{escape(words)}</summary>{table}</details>")
        return table + page(f'<div class="nbinfer-foot">{escape(words)}</div>')


def plot_sweep(estimate: Estimate, **options: Any) -> Picture:
    """Draw the memory that a model takes, by setting: its parts against what is free.

    ``plot_sweep(nb.estimate("demo"), context_size=[512, 1024], kv_type=["f16", "q8_0"])``: bars by the first
    option, panels by the second; a row of panels for each device that matters. By formula, as
    :meth:`Estimate.sweep`.

    Parameters
    ----------
    estimate
        As :func:`nbinfer.estimate` returns it; its other settings stay.
    options
        One or two of its options, each with the values to try.

    Returns
    -------
    Picture
        ``frame`` has a row per setting and device: the options, device, needed_bytes, free_bytes, verdict,
        and the bytes of each part.

    Raises
    ------
    RequestError
        No option is given, or more than two, or one has no values.
    """
    if not 1 <= len(options) <= 2:  # noqa: PLR2004 - the axis and the panels
        raise RequestError(
            "plot_sweep takes one or two options with a list of values each: context_size=[4096, 8192]."
        )
    for name, values in options.items():
        if isinstance(values, str) or not hasattr(values, "__len__") or not len(values):
            raise RequestError(f"{name}={values!r} is not a list of values to try.")
    frame = _sweep_frame(estimate, options)
    alt = f"Memory of {estimate.model} by {' and '.join(options)}, against what is free."
    if not _can_draw():
        return Picture(frame, alt)
    return Picture(frame, alt, _sweep_figure(frame, options, estimate.model))


def plot_bench(measured: Any) -> Picture:
    """Draw what :func:`nbinfer.bench` measured: rates and waiting times, by how many requests ran at once.

    Bars are medians, points the single runs.

    Parameters
    ----------
    measured
        A table of :func:`nbinfer.bench`, or several by name, to compare: ``{"f16": a, "q8_0": b}``.

    Returns
    -------
    Picture
        ``frame`` has the medians: a row per name and number of requests at once.

    Raises
    ------
    RequestError
        It is not a table of :func:`nbinfer.bench`.
    """
    tables = dict(measured) if isinstance(measured, Mapping) else {_bench_name(measured): measured}
    wanted = ["parallel", *_BENCH_PANELS]
    for name, table in tables.items():
        missing = [c for c in wanted if not isinstance(table, pd.DataFrame) or c not in table.columns]
        if missing or table.empty:
            raise RequestError(
                f"{name!r} is not a table of nb.bench: {', '.join(missing) or 'rows'} missing."
            )
    if not tables:
        raise RequestError("there is nothing to draw: pass a table of nb.bench.")
    runs = pd.concat([table[wanted].assign(name=name) for name, table in tables.items()], ignore_index=True)
    medians = runs.groupby(["name", "parallel"], sort=False)[list(_BENCH_PANELS)].median().reset_index()
    alt = f"Speed of {' and '.join(tables)}, by how many requests run at once."
    if not _can_draw():
        return Picture(medians, alt)
    return Picture(medians, alt, _bench_figure(runs, medians, list(tables)))


def plot_similarity(
    data: Any,
    *,
    on: Any = None,
    label: Any = None,
    group: Any = None,
    query: Any = None,
    k: int = 3,
    model: Any = None,
) -> Picture:
    """Draw vectors in the plane: what lies near means like, as far as two dimensions can tell.

    The plane is that of the two principal components (PCA) of the unit vectors; the axes say how much of the
    differences it holds. Distances in it deceive where that is little, so the lines from a query go to its
    true nearest rows, with their cosines.

    Parameters
    ----------
    data
        A frame with vectors in the column ``on``, as :func:`nbinfer.embed` made them, or with texts, which
        are embedded; such a column alone; or a matrix of shape (n, d).
    label
        A column of short texts to write beside the points. Where they would cover each other, some are left
        out.
    group
        A column whose values colour the points.
    query
        A text, or a vector: drawn among them, with lines to its ``k`` nearest rows.
    model
        The embedding model for a query that is a text; None: the default, else the only one loaded.

    Returns
    -------
    Picture
        ``frame`` has a row per vector: x, y, and label, group and cosine (to the query) where asked for.

    Raises
    ------
    RequestError
        A column is unknown, or fewer than three rows have vectors.
    """
    from nbinfer.frames.neighbours import top_k, unit
    from nbinfer.frames.searching import both_sides

    if query is not None and not isinstance(query, str):
        query = np.asarray(query, np.float32)
    matrix, asked, table = both_sides(data, on=on, query=query, model=model)
    whole = np.isfinite(matrix).all(axis=1) & (np.linalg.norm(matrix, axis=1) > 0)
    if whole.sum() < 3:  # noqa: PLR2004 - a plane
        raise RequestError("plot_similarity needs at least three rows with vectors.")
    columns = {"label": label, "group": group}
    named = {
        key: table.values([str(name)], 0, table.rows)[0] for key, name in columns.items() if name is not None
    }
    points = unit(matrix[whole])
    place, share = _principal_plane(points)
    frame = pd.DataFrame(place(points), columns=["x", "y"])
    for key, values in named.items():
        frame[key] = [value for value, keep in zip(values, whole, strict=True) if keep]
    spot, near = None, []
    if asked is not None:
        towards = unit(asked[:1])
        spot = place(towards)[0]
        frame["cosine"] = (points @ towards[0]).astype(float)
        _, rows, _, scores = top_k(towards, points, k)
        near = list(zip(rows.tolist(), scores.tolist(), strict=True))
    held = f"{share:.0%} of their differences"
    alt = f"{len(frame)} vectors in the plane of their two principal components, which holds {held}."
    if not _can_draw():
        return Picture(frame, alt)
    words = query if isinstance(query, str) else "query"
    return Picture(frame, alt, _plane_figure(frame, held, spot, near, words))


# -- what is drawn ------------------------------------------------------------------------------------------


def _sweep_frame(estimate: Estimate, options: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
    from nbinfer.memory.show import parts

    rows = []
    for values in product(*options.values()):
        changes = dict(zip(options, values, strict=True))
        for device in estimate.again(**changes, exact=False).devices:
            sizes = {f"{key}_bytes": size for key, _, size in parts(device)}
            facts = {"device": device.name, "needed_bytes": sum(sizes.values())}
            facts |= {"free_bytes": device.available, "verdict": device.verdict}
            rows.append({**changes, **facts, **sizes})
    frame = pd.DataFrame(rows)
    keys = [c for c in frame.columns if c.endswith("_bytes")]
    frame[keys] = frame[keys].fillna(0).astype("int64")
    share = (frame["needed_bytes"] / frame["free_bytes"].clip(lower=1)).groupby(frame["device"]).max()
    shown = [name for name, most in share.items() if most > _WORTH_A_PANEL] or [share.idxmax()]
    return frame[frame["device"].isin(shown)].reset_index(drop=True)


def _sweep_figure(frame: pd.DataFrame, options: Mapping[str, Sequence[Any]], model: str) -> Figure:
    from matplotlib.patches import Patch

    from nbinfer.memory.show import COLOURS, LABELS

    across, *second = options
    panels = list(options[second[0]]) if second else [None]
    devices = list(dict.fromkeys(frame["device"]))
    width = 2.0 + len(panels) * (0.75 * len(options[across]) + 0.6)
    figure = _figure(width=max(4.6, min(9.0, width)), height=0.9 + 2.3 * len(devices))
    axes = figure.subplots(len(devices), len(panels), squeeze=False, sharey="row")
    for row, device in zip(axes, devices, strict=True):
        of_device = frame[frame["device"] == device]
        most, free = int(of_device["needed_bytes"].max()), int(of_device["free_bytes"].iloc[0])
        unit, word = _unit(most)
        top = 1.2 * max(most, free if free <= _NEAR * most else 0)
        for ax, panel in zip(row, panels, strict=True):
            part = of_device if panel is None else of_device[of_device[second[0]] == panel]
            _stacks(ax, part.set_index(across).loc[list(options[across])], unit)
            if free < top:
                ax.axhline(free / unit, color=INK, linestyle="--", linewidth=1.4)
            ax.set_ylim(0, top / unit)
        words = f" {human_bytes(free)}\n free" + ("" if free < top else ",\n far above")
        side = row[-1].get_yaxis_transform()  # beside the axes: on a bar it could not be read
        at = min(free, top) / unit
        _write(row[-1], 1.0, at, words, transform=side, va="center" if free < top else "top")
        row[0].set_ylabel(f"{_short(device)} ({word})", color=INK)
    for ax, panel in zip(axes[0], panels, strict=True):
        if panel is not None:
            ax.set_title(f"{second[0]} = {_value(panel)}", color=INK, fontsize=10)
    for ax in axes[-1]:
        ax.set_xlabel(across, color=INK)
    _title(figure, model)
    drawn = [key for key in COLOURS if f"{key}_bytes" in frame and frame[f"{key}_bytes"].any()]
    _legend(figure, [Patch(color=COLOURS[key], label=LABELS[key]) for key in drawn])
    return figure


def _stacks(ax: Axes, settings: pd.DataFrame, unit: int) -> None:
    """Draw a stack of parts for each setting (the index), with the verdict on top."""
    from nbinfer.memory.show import COLOURS

    for x, (_, setting) in enumerate(settings.iterrows()):
        bottom = 0.0
        for key, colour in COLOURS.items():
            size = setting.get(f"{key}_bytes", 0) / unit
            if size:
                ax.bar(x, size, bottom=bottom, width=0.72, color=colour)
                bottom += size
        verdict = setting["verdict"]
        look = {"color": _VERDICT_COLOURS[verdict], "ha": "center", "va": "bottom", "fontsize": 11}
        _write(ax, x, bottom, _MARKS[verdict], **look)
    ax.set_xlim(-0.55, len(settings) - 0.45)
    ax.set_xticks(range(len(settings)), [_short(_value(value)) for value in settings.index])
    _dress(ax)


_BENCH_PANELS = {
    "tokens_per_second": ("writing (tokens/s)", 1.0),
    "prompt_tokens_per_second": ("reading (tokens/s)", 1.0),
    "first_token_seconds": ("first token after (ms)", 1000.0),
}


def _bench_name(table: Any) -> str:
    return str(getattr(table, "attrs", {}).get("model") or "the model")


def _bench_figure(runs: pd.DataFrame, medians: pd.DataFrame, names: list[str]) -> Figure:
    from matplotlib.patches import Patch

    levels = sorted(runs["parallel"].unique())
    several = len(names) > 1
    figure = _figure(width=8.4, height=3.3 if several else 3.0)
    axes = figure.subplots(1, len(_BENCH_PANELS), squeeze=False)[0]
    width = 0.8 / len(names)
    for ax, (column, (title, scale)) in zip(axes, _BENCH_PANELS.items(), strict=True):
        for i, name in enumerate(names):
            shift = (i - (len(names) - 1) / 2) * width
            mine, each = medians[medians["name"] == name], runs[runs["name"] == name]
            at = [levels.index(level) + shift for level in mine["parallel"]]
            ax.bar(at, mine[column] * scale, width=0.9 * width, color=GROUPS[i % len(GROUPS)])
            at = [levels.index(level) + shift for level in each["parallel"]]
            ax.scatter(at, each[column] * scale, s=14, facecolors="none", edgecolors=INK)
        ax.set_title(title, color=INK, fontsize=10)
        ax.set_xticks(range(len(levels)), [str(level) for level in levels])
        ax.set_xlabel("requests at once", color=INK)
        ax.set_ylim(bottom=0)
        _dress(ax)
    if several:
        _legend(figure, [Patch(color=GROUPS[i % len(GROUPS)], label=_short(n)) for i, n in enumerate(names)])
    else:
        _title(figure, names[0])
    return figure


def _principal_plane(points: NDArray[np.float32]) -> tuple[Any, float]:
    """Return a function that puts vectors into the plane, and the share of the variance that it holds."""
    middle = points.mean(axis=0)
    centred = (points - middle).astype(np.float64)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    plane = vectors[:, ::-1][:, :2]
    # An axis has no direction of its own: the largest component counts as positive.
    plane = plane * np.sign(plane[np.abs(plane).argmax(axis=0), [0, 1]])
    total = float(values.sum())
    share = float(values[-2:].sum()) / total if total > 0 else 1.0

    def place(matrix: NDArray[np.float32]) -> NDArray[np.float64]:
        out: NDArray[np.float64] = (matrix - middle).astype(np.float64) @ plane
        return out

    return place, share


def _plane_figure(
    frame: pd.DataFrame, held: str, spot: Any, near: list[tuple[int, float]], words: str
) -> Figure:
    figure = _figure(width=7.4, height=4.8)
    ax = figure.subplots()
    xy = frame[["x", "y"]].to_numpy()
    if "group" in frame:
        for i, (name, mine) in enumerate(_groups(frame["group"])):
            marker = "os^D"[i // len(GROUPS) % 4]  # beyond the colours, shapes
            colour = GROUPS[i % len(GROUPS)] if name else INK
            label = _short(name) if name else "others"
            ax.scatter(xy[mine, 0], xy[mine, 1], s=26, color=colour, marker=marker, label=label)
        _as_written(ax.legend(loc="best", frameon=False, fontsize=9))
    else:
        ax.scatter(xy[:, 0], xy[:, 1], s=26, color=GROUPS[0])
    texts: list[tuple[float, float, str, str]] = []
    if spot is not None:
        for row, score in near:
            ax.plot([spot[0], xy[row, 0]], [spot[1], xy[row, 1]], color=GROUPS[1], linewidth=1.2, zorder=0)
            texts.append((*(np.asarray(spot) + xy[row]) / 2, f"{score:.2f}", GROUPS[1]))
        ax.scatter([spot[0]], [spot[1]], s=110, marker="*", color=GROUPS[1])
        texts.insert(0, (*spot, words, GROUPS[1]))
    if "label" in frame:
        first = [row for row, _ in near]  # what is labelled first is labelled surely
        order = [*first, *(row for row in range(len(frame)) if row not in set(first))]
        texts += [(*xy[row], str(frame["label"].iloc[row]), INK) for row in order[:_MOST_LABELS]]
    ax.margins(0.14)
    ax.set_xlabel(f"first of two principal components, which hold {held}", color=INK)
    ax.set_ylabel("second", color=INK)
    ax.set_xticks([])
    ax.set_yticks([])
    _dress(ax)
    _label(figure, ax, xy, texts)
    return figure


def _groups(values: pd.Series[Any]) -> list[tuple[str, NDArray[np.bool_]]]:
    """Return (name, rows) of the groups that have most rows, in their order; of the others together as ""."""
    words = values.astype(str)
    most = set(words.value_counts().index[:_MOST_GROUPS])
    names = words.where(words.isin(most), "")
    return [
        (name, (names == name).to_numpy()) for name in sorted(names.unique(), key=lambda name: name == "")
    ]


def _label(figure: Figure, ax: Axes, points: Any, texts: list[tuple[float, float, str, str]]) -> None:
    """Write each text beside its point, where nothing is yet; one that finds no place is left out."""
    from matplotlib.transforms import Bbox

    with _quietly():
        figure.draw_without_rendering()
        inside = ax.get_window_extent()
        dots = ax.transData.transform([(x, y) for x, y in points])
        taken = [Bbox.from_bounds(x - _DOT, y - _DOT, 2 * _DOT, 2 * _DOT) for x, y in dots]
        for x, y, words, colour in texts:
            note = ax.annotate(
                _short(words),
                (x, y),
                xytext=(0, 0),
                textcoords="offset points",
                color=colour,
                fontsize=9,
                parse_math=False,
                fontfamily=_fonts(),
            )
            for dx, dy, ha, va in _BESIDE:
                note.set(ha=ha, va=va, position=(dx, dy))
                box = note.get_window_extent()
                within = (
                    box.x0 >= inside.x0
                    and box.x1 <= inside.x1
                    and box.y0 >= inside.y0
                    and box.y1 <= inside.y1
                )
                if within and not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break
            else:
                note.remove()


_BESIDE = (
    (6, 0, "left", "center"),
    (-6, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (-5, 5, "right", "bottom"),
    (-5, -5, "right", "top"),
    (5, 5, "left", "bottom"),
    (5, -5, "left", "top"),
)


# -- the paper ----------------------------------------------------------------------------------------------


def _can_draw() -> bool:
    return find_spec("matplotlib") is not None


def _figure(*, width: float, height: float) -> Figure:
    """Return an empty figure, in inches. Not by way of pyplot, which keeps and shows figures by itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(ax: Axes) -> None:
    ax.patch.set_alpha(0)
    ax.tick_params(colors=INK, labelsize=9, length=3)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    for text in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        text.set_parse_math(False)


def _title(figure: Figure, words: str) -> None:
    figure.suptitle(_short(words), color=INK, fontsize=11, parse_math=False, fontfamily=_fonts())


def _legend(figure: Figure, handles: list[Any]) -> None:
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(int(figure.get_figwidth() / 1.3), len(handles)),
        frameon=False,
        fontsize=9,
    )
    _as_written(legend)


def _as_written(legend: Any) -> None:
    """Have a legend's words shown as they are: a dollar in a name begins no formula."""
    for text in legend.get_texts():
        text.set(color=INK, parse_math=False, fontfamily=_fonts())


def _write(ax: Axes, x: float, y: float, words: str, **look: Any) -> None:
    ax.text(x, y, words, **{"color": INK, "fontsize": 9, "parse_math": False, "fontfamily": _fonts(), **look})


def _fonts() -> list[str]:
    from matplotlib import font_manager

    known = set(font_manager.get_font_names())
    return [name for name in _FONTS if name in known]


def _unit(size: int) -> tuple[int, str]:
    return (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _short(text: str) -> str:
    text = " ".join(printable(text).split())
    return text if len(text) <= _LABEL_LENGTH else text[: _LABEL_LENGTH - 1] + "…"


class _quietly(warnings.catch_warnings):  # noqa: N801 - a with statement
    """A letter that no font here has is drawn as a box, which says it already."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        return entered
