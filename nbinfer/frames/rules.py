"""What every operator takes, whatever it asks: where its rows are computed, and by which rules.

An operator's own signature names all of these arguments, because a person reads and completes them there; in
its body they are one value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import NotSupported, RequestError
from nbinfer.frames.output import Output
from nbinfer.frames.plan import choice, make_plan, once
from nbinfer.frames.progress import make_sink
from nbinfer.frames.run import Run, remember

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nbinfer.contract.modes import Mode
    from nbinfer.frames.outcomes import Columns
    from nbinfer.frames.plan import CacheMode, Expand, Nulls, OnError, TooLong
    from nbinfer.frames.progress import Sink
    from nbinfer.frames.prompts import Prompt
    from nbinfer.frames.tables import Table
    from nbinfer.frames.work import FrameModel, Work

IN_BACKGROUND: Any = object()
"""The ``progress`` of an operator that :func:`nbinfer.submit` calls: it returns its run, started."""


@dataclass(frozen=True)
class Rules:
    """The arguments that operators have in common, as :func:`nbinfer.complete` documents them.

    An operator that does not take one of them leaves it at its default.

    Raises
    ------
    RequestError
        One of them is wrong: found before a row is read, a model loaded or a server asked.
    """

    model: Any = None
    client: Any = None
    endpoints: Any = None
    cache: CacheMode = True
    on_error: OnError = "null"
    nulls: Nulls = "skip"
    too_long: TooLong = "error"
    keep: bool = True
    progress: bool | Sink | None = None

    def __post_init__(self) -> None:
        if self.client is not None and self.endpoints is not None:
            raise RequestError("client= and endpoints= are two places to run at: leave one out.")
        choice("cache", self.cache, (True, False, "refresh"))
        choice("on_error", self.on_error, ("null", "raise", "stop"))
        choice("nulls", self.nulls, ("skip", "empty", "error"))
        choice("too_long", self.too_long, ("error", "head", "tail", "middle"))
        if self.progress is not IN_BACKGROUND:
            make_sink(self.progress)

    def model_for(self, mode: Mode) -> FrameModel:
        """Return the model that computes the rows: a loaded one, or one elsewhere, which is reached here.

        Raises
        ------
        ModelNotFound
            None is loaded, or several and none was named.
        NotSupported
            The model was loaded for another mode.
        """
        if self.client is not None:
            from nbinfer.frames.cluster import on_cluster

            return on_cluster(self.client, self.model, mode)
        if self.endpoints is not None:
            from nbinfer.frames.fanout import open_endpoints

            return open_endpoints(self.endpoints, self.model, mode)
        return loaded(self.model, mode)

    def output(
        self,
        table: Table,
        values: Sequence[str],
        beside: Sequence[str],
        *,
        name: Any,
        per_row: int = 1,
        can_drop: bool = True,
    ) -> Output:
        """Return the columns that a call adds; where texts may be cut, one says of which rows they were.

        Parameters
        ----------
        values, beside
            Columns of values, whose names are the caller's business, and those beside them.
        name
            What the columns beside the values are prefixed with where their names are taken.
        can_drop
            Whether the call has ``keep=False`` to offer.

        Raises
        ------
        RequestError
            A name is taken, or is no text.
        """
        if not isinstance(name, str) or not name:
            raise RequestError(f"name={name!r}: it is what the new column is called, a text.")
        beside = beside if self.too_long == "error" else (*beside, "truncated")
        names = table.free_names(values, beside, prefix=name, keep=self.keep, can_drop=can_drop)
        return Output(table, names, self.keep, per_row)

    def batch(
        self,
        table: Table,
        prompt: Prompt,
        work: Work,
        model: FrameModel,
        build: Callable[[Run, Columns], Any],
        *,
        params: Mapping[str, Any],
        expand: Expand = once,
        per_row: int = 1,
        seed: int | None = 0,
        draws: bool = False,
        advice: str | None = None,
    ) -> Run:
        """Return the run of these rows, planned and not started; :func:`nbinfer.last_run` gives it from now.

        Parameters
        ----------
        build
            Makes the frame of a run's columns, at any time.
        params
            The call's own arguments, for the provenance.
        advice
            What the progress says beside its bar.
        expand, per_row, seed, draws
            As for :func:`~nbinfer.frames.plan.make_plan`.
        """
        plan = make_plan(
            table,
            prompt,
            work,
            model,
            expand=expand,
            per_row=per_row,
            seed=seed,
            draws=draws,
            nulls=self.nulls,
            cache=self.cache,
            too_long=self.too_long,
        )
        return remember(Run(plan, build, params=params, on_error=self.on_error, advice=advice))

    def result(self, run: Run, *, sink: Sink | None = None) -> Any:
        """Run it and return the frame; in the background, start it and return the run.

        Parameters
        ----------
        sink
            Where to show progress instead of where ``progress`` says.
        """
        if self.progress is IN_BACKGROUND:
            return run.start()
        return run.run(sink or make_sink(self.progress))


def loaded(model: Any, mode: Mode) -> FrameModel:
    """Return a loaded model: itself, by its name, or for None the default, else the only one.

    Raises
    ------
    ModelNotFound
        None is loaded, or several and none was named.
    NotSupported
        The model was loaded for another mode.
    """
    if model is None or isinstance(model, str):
        from nbinfer import session

        model = session.get(model, mode=mode)
    if model.info.mode is not mode:
        raise NotSupported(
            f"{model.name} is loaded for {model.info.mode}, and this call needs {mode}.\n"
            f"Load it so: nb.load({model.name!r}, mode={mode.value!r}).",
        )
    found: FrameModel = model
    return found
