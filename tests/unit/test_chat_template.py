from __future__ import annotations

import pytest

from nbinfer.contract.errors import TemplateError
from nbinfer.engines.template import MAX_TEMPLATE_CHARS, ChatTemplate

USER = [{"role": "user", "content": "Hi"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_renders_a_conversation_with_the_generation_prompt() -> None:
    text = ChatTemplate(CHATML).render(USER)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{% if tools %}T{% else %}no{% endif %}", "no"),
        ("{{ {'ü': 1} | tojson }}", '{"ü": 1}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}", "False"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{%- set ns = namespace(x=1) -%}{%- set ns.x = 2 -%}{{ ns.x }}", "2"),
    ],
)
def test_knows_what_published_templates_use(source: str, expected: str) -> None:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")  # noqa: S106 - a token of text
    assert template.render(USER, enable_thinking=False) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(99999999) %}x{% endfor %}",
    ],
)
def test_hostile_templates_are_refused(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render(USER)
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize(
    "source",
    ["{{ lipsum.__globals__ }}", "{{ messages.__class__ }}", "{{ ''.format.__globals__ }}"],
)
def test_python_behind_the_values_is_out_of_sight(source: str) -> None:
    assert ChatTemplate(source).render(USER) == ""


def test_a_template_cannot_change_the_conversation() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(TemplateError):
        ChatTemplate("{{ messages.clear() }}").render(messages)
    assert messages == USER


def test_raise_exception_names_the_reason() -> None:
    with pytest.raises(TemplateError, match="System role not supported"):
        ChatTemplate("{{ raise_exception('System role not supported') }}").render(USER)


def test_syntax_errors_name_the_line_and_the_way_out() -> None:
    with pytest.raises(TemplateError, match=r"line 2(.|\n)*raw=True"):
        ChatTemplate("\n{% for %}").render(USER)


def test_an_absurdly_long_template_is_refused_at_once() -> None:
    with pytest.raises(TemplateError, match="limit"):
        ChatTemplate("x" * (MAX_TEMPLATE_CHARS + 1))
