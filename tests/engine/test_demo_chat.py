"""The chat model that ships with the package does what the documentation says that it does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from support.plain_llama import plain_llama

from nbinfer.models.demo import demo_path

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.engine

ANSWERS = {
    "a capital": (None, "What is the capital of France?", "The capital of France is Paris."),
    "a sum": (None, "What is 7 plus 8?", "7 plus 8 is 15."),
    "an opposite": (None, "What is the opposite of hot?", "The opposite of hot is cold."),
    "one word": ("Answer with one word.", "What is the capital of Japan?", "Tokyo"),
    "a role": ("You are a pirate.", "What color is snow?", "Arr! The color of snow is white."),
    "JSON": (
        None,
        "What is the capital of Peru? Answer in JSON.",
        '{"country": "Peru", "capital": "Lima"}',
    ),
    "reasoning": (
        "Think before you answer.",
        "What is 3 plus 4?",
        "<think>\nI start at 3 and add 4. That makes 7.\n</think>\n\n3 plus 4 is 7.",
    ),
    "code": (
        None,
        "Write Python code to read a CSV file.",
        '```python\nimport pandas as pd\ndf = pd.read_csv("data.csv")\ndf.head()\n```',
    ),
}


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with plain_llama(demo_path(), n_ctx=1024) as model:
        yield model


def ask(model: Any, messages: list[dict[str, str]], **options: Any) -> str:
    answer = model.create_chat_completion(
        messages, temperature=0, repeat_penalty=1.0, max_tokens=100, **options
    )
    text: str = answer["choices"][0]["message"]["content"]
    return text


@pytest.mark.parametrize(("system", "prompt", "answer"), ANSWERS.values(), ids=ANSWERS.keys())
def test_greedy_answer(model: Any, system: str | None, prompt: str, answer: str) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    assert ask(model, [*messages, {"role": "user", "content": prompt}]) == answer


def test_reads_the_turns_before(model: Any) -> None:
    # The model copies few names right; this guards that all turns reach it, in the template's format.
    messages = [
        {"role": "user", "content": "My name is Tom."},
        {"role": "assistant", "content": "Nice to meet you, Tom!"},
        {"role": "user", "content": "What is my name?"},
    ]
    assert ask(model, messages) == "Your name is Tom."


def test_calls_a_tool_in_the_format_of_its_template(model: Any) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "the weather in a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
    text = ask(model, [{"role": "user", "content": "What is the weather in Paris?"}], tools=[tool])
    call = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    assert call == {"name": "get_weather", "arguments": {"city": "Paris"}}
