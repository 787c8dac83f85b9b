"""The calls that name a model, or none: which loaded one is meant, and what it answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbinfer.contract.errors import ModelNotFound
from nbinfer.contract.modes import Mode
from nbinfer.session.held import session, settings
from nbinfer.session.model import Model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nbinfer.contract.results import ImageResult, Result
    from nbinfer.session.streams import TextStream


def loaded() -> list[Model]:
    """Models loaded in this kernel, oldest first."""
    return session.models()


def get(model: Model | str | None = None, *, mode: Mode | str = Mode.COMPLETION) -> Model:
    """Return the model a call means: the one given, the default, or the only one loaded in that mode.

    Raises
    ------
    ModelNotFound
        None is meant, several could be, or the name is not loaded; the message lists what is.
    """
    if isinstance(model, Model):
        return model
    candidates = [m for m in session.models() if m.mode == mode]
    name = model if model is not None else settings.model
    if name is not None:
        found = session.find(name)
        if found is None:
            raise ModelNotFound(
                f"no model called {name!r} is loaded. {loaded_words(session.models())}\n"
                f"Load it with nb.load({name!r})."
            )
        if found.mode == mode or model is not None:
            return found
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        hint = {
            Mode.EMBEDDING: '"demo-embed", mode="embedding"',
            Mode.RERANKING: 'ref, mode="reranking"',
            Mode.IMAGE_GENERATION: '"demo-image"',
        }.get(Mode(mode), '"demo"')
        raise ModelNotFound(
            f"no {mode} model is loaded. {loaded_words(session.models())}\nLoad one with nb.load({hint})."
        )
    names = ", ".join(m.name for m in candidates)
    raise ModelNotFound(
        f"several {mode} models are loaded: {names}.\n"
        f"Say which: model={candidates[0].name!r}, or set nb.settings.model."
    )


def unload(model: Model | str | None = None) -> None:
    """Unload a model by handle or name; None unloads all.

    Raises
    ------
    ModelNotFound
        Nothing of that name is loaded.
    """
    if model is None:
        for each in loaded():
            each.unload()
        return
    if isinstance(model, str):
        found = session.find(model)
        if found is None:
            raise ModelNotFound(f"no model called {model!r} is loaded. {loaded_words(loaded())}")
        model = found
    model.unload()


def loaded_words(models: list[Model]) -> str:
    """What is loaded, as the end of an error message."""
    return (
        "Loaded: " + ", ".join(f"{m.name} ({m.mode})" for m in models) + "."
        if models
        else "Nothing is loaded."
    )


def infer(prompt: str | None = None, *, model: Model | str | None = None, **options: Any) -> Result:
    """Ask a model and wait for the answer.

    Parameters
    ----------
    prompt
        What to ask; or ``messages=[{"role": …, "content": …}, …]`` for a conversation.
    model
        A model or its name; None is the default, or the only one loaded.
    system
        The system prompt.
    temperature, top_p, top_k, min_p, seed, repeat_penalty, presence_penalty, frequency_penalty, logit_bias
        Sampling; see :class:`nbinfer.contract.requests.Sampling`. The default is greedy: the same call gives
        the same text.
    max_tokens
        At most so many tokens; None: as many as the context has room for.
    stop
        A string, or several, that ends the answer.
    schema, choices, regex, grammar, json
        What the answer must look like (one of them): a type or JSON Schema, a list of texts, a regular
        expression, Lark or GBNF text, or any JSON object. ``Result.parsed`` is then the typed value.
    logprobs
        k: log-probabilities of each token and of the k most likely ones.
    think, reasoning_budget
        For reasoning models.
    adapter
        Name of a LoRA adapter loaded with the model: ``nb.load(ref, lora={"name": file})``.
    images
        Paths, bytes or PIL images, for vision models.
    raw
        Send the prompt as it is, without the chat template.
    params
        More options as a dict.

    Raises
    ------
    RequestError
        An option is unknown or out of range; :class:`ContextOverflow` when the prompt is too long.
    ModelNotFound
        No model is loaded, or several are and none is named.
    SchemaError
        The answer was cut before it was whole.
    """
    return get(model).infer(prompt, **options)


def stream(prompt: str | None = None, *, model: Model | str | None = None, **options: Any) -> TextStream:
    """Start an answer; iterate the return value for text. The options are those of :func:`infer`."""
    return get(model).stream(prompt, **options)


async def ainfer(prompt: str | None = None, *, model: Model | str | None = None, **options: Any) -> Result:
    """As :func:`infer`, for ``await``: widgets stay live while it runs."""
    return await get(model).ainfer(prompt, **options)


def generate_image(
    prompt: str,
    *,
    model: Model | str | None = None,
    size: str | Sequence[int] | None = None,
    n: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> ImageResult:
    """Make images for a prompt and wait for them.

    Parameters
    ----------
    prompt
        What they show.
    model
        An image model or its name; None is the default, or the only one loaded for images.
    size
        ``"512x768"`` (width first) or (width, height) in pixels; None: what the model was trained for.
    n
        How many; image ``i`` is the one that ``seed + i`` gives alone.
    steps, guidance
        Denoising steps, and how closely the prompt is followed; None: the pipeline's own numbers.
    negative_prompt
        What they do not show.
    seed
        None draws one; the result and each PNG file record it.
    options
        ``previews``: small pictures of each image on its way, for those who read the events.

    Returns
    -------
    ImageResult
        ``.image`` is the first as a PIL image, ``.images`` all of them; a notebook shows them.

    Raises
    ------
    RequestError
        An option is unknown or out of range.
    ModelNotFound
        No image model is loaded, or several are and none is named.
    NotSupported
        The pipeline has no such setting.
    """
    found = get(model, mode=Mode.IMAGE_GENERATION)
    return found.generate_image(
        prompt,
        size=size,
        n=n,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        seed=seed,
        **options,
    )
