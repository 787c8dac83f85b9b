"""Other people's clients, unmodified, against the service's TCP address."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import openai
import pydantic
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.sidecar import Sidecar

pytestmark = pytest.mark.engine

ASK: Any = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    large: bool


@pytest.fixture
def client(served: Sidecar) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.address, api_key=served.token, max_retries=0, timeout=60) as made:
        yield made


def test_openai_chat_counts_its_tokens(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="demo", messages=ASK, temperature=0)
    assert found.choices[0].message.content == ANSWER
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens > 0


def test_openai_streams_and_the_last_chunk_has_the_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ANSWER
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_openai_async_runs_side_by_side(served: Sidecar) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=served.address, api_key=served.token) as client:
            found = await asyncio.gather(
                *(client.chat.completions.create(model="demo", messages=ASK, temperature=0) for _ in range(4))
            )
            return [each.choices[0].message.content for each in found]

    assert asyncio.run(ask()) == [ANSWER] * 4


def test_openai_parses_a_pydantic_class(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(
        model="demo",
        messages=[{"role": "user", "content": "Describe Paris."}],
        temperature=0,
        max_tokens=60,
        response_format=City,
    )
    assert isinstance(found.choices[0].message.parsed, City)


def test_openai_learns_that_a_structured_answer_was_cut(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="demo", messages=ASK, max_tokens=2, response_format=City)


def test_openai_gets_n_answers_of_seeds_in_a_row(client: openai.OpenAI) -> None:
    several = client.chat.completions.create(
        model="demo", messages=ASK, temperature=1.5, seed=40, n=3, max_tokens=8
    )
    single = [
        client.chat.completions.create(model="demo", messages=ASK, temperature=1.5, seed=40 + i, max_tokens=8)
        for i in range(3)
    ]
    assert [each.message.content for each in several.choices] == [
        each.choices[0].message.content for each in single
    ]
    assert [each.index for each in several.choices] == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_openai_calls_the_tool_that_is_required(client: openai.OpenAI, stream: bool) -> None:
    tool: Any = {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    options: Any = {"model": "demo", "messages": ASK, "tools": [tool], "tool_choice": "required"}
    if stream:
        with client.chat.completions.stream(**options) as events:
            for event in events:
                del event
            message = events.get_final_completion().choices[0].message
    else:
        found = client.chat.completions.create(**options)
        assert found.choices[0].finish_reason == "tool_calls"
        message = found.choices[0].message
    assert message.tool_calls
    call: Any = message.tool_calls[0]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert call.id.startswith("call")


def test_openai_reads_log_probabilities(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="demo", messages=ASK, temperature=0, logprobs=True, top_logprobs=2, max_tokens=5
    )
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for each in logprobs.content:
        assert each.logprob <= 0
        assert len(each.top_logprobs) == 2
        assert each.top_logprobs[0].token == each.token


def test_openai_completes_text_and_lists_of_it(client: openai.OpenAI) -> None:
    found = client.completions.create(
        model="demo", prompt=["The capital of", "Once upon"], temperature=0, max_tokens=6
    )
    assert [each.index for each in found.choices] == [0, 1]
    alone = client.completions.create(model="demo", prompt="Once upon", temperature=0, max_tokens=6)
    assert alone.choices[0].text == found.choices[1].text


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_openai_embeds(client: openai.OpenAI, encoding: Any) -> None:
    options = {} if encoding is None else {"encoding_format": encoding}
    found = client.embeddings.create(model="demo-embed", input=["a cat", "a dog"], dimensions=64, **options)
    assert [each.index for each in found.data] == [0, 1]
    if encoding != "base64":
        assert [len(each.embedding) for each in found.data] == [64, 64]
        assert sum(number**2 for number in found.data[0].embedding) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("request_", "error", "code"),
    [
        ({"model": "nonsense", "messages": ASK}, openai.NotFoundError, "model_not_found"),
        ({"model": "demo", "messages": []}, openai.BadRequestError, None),
        ({"model": "demo", "messages": ASK, "temperature": 9}, openai.BadRequestError, None),
        (
            {"model": "demo", "messages": [{"role": "user", "content": "word " * 3000}]},
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        (
            {
                "model": "demo",
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}],
                    }
                ],
            },
            openai.BadRequestError,
            None,
        ),
    ],
)
def test_openai_raises_its_own_errors(
    client: openai.OpenAI, request_: Any, error: type[openai.APIStatusError], code: str | None
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**request_)
    assert caught.value.code == code
    assert caught.value.message


def test_openai_lists_models(client: openai.OpenAI) -> None:
    names = [each.id for each in client.models.list()]
    assert {"demo", "demo-embed"} <= set(names)
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nonsense")


def test_langchain_chats_streams_and_embeds(served: Sidecar) -> None:
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    options: Any = {"base_url": served.address, "api_key": served.token}
    chat = ChatOpenAI(model="demo", temperature=0, **options)
    assert chat.invoke("What is the capital of France?").content == ANSWER
    assert "".join(str(chunk.content) for chunk in chat.stream("What is the capital of France?")) == ANSWER
    found = chat.with_structured_output(City).invoke("Describe Paris.")
    assert isinstance(found, City)
    embeddings = OpenAIEmbeddings(model="demo-embed", check_embedding_ctx_length=False, **options)
    assert len(embeddings.embed_query("a cat")) == 384


@pytest.mark.parametrize("stream", [True, False])
def test_the_llm_command_answers(served: Sidecar, tmp_path: Path, stream: bool) -> None:
    entry = {"model_id": "local", "model_name": "demo", "api_base": served.address, "api_key_name": "nb"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([entry]))
    (tmp_path / "keys.json").write_text(json.dumps({"nb": served.token}))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "llm", "-m", "local", "-o", "temperature", "0"),
            *(() if stream else ("--no-stream",)),
            "What is the capital of France?",
        ],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == ANSWER, done.stderr
