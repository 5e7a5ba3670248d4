"""coordinator/text/template.py: a model's own Jinja template, in a sandbox."""

from __future__ import annotations

from datetime import datetime

import pytest

from cluster.errors import ModelError, RequestError
from coordinator.text.template import ChatTemplate

HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, str]] = HI, **special: str) -> str:
    return ChatTemplate(source, special, now=lambda: datetime(2026, 1, 31)).render(messages)


def test_messages_special_tokens_and_the_generation_prompt_are_there() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert render(source, bos_token="<s>") == "<s>[user]hi[assistant]"


def test_blocks_are_trimmed_as_transformers_does() -> None:
    assert render("  {% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"


def test_loop_controls_work() -> None:
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_generation_blocks_render_their_contents() -> None:
    assert render("a{% generation %}b{% endgeneration %}c") == "abc"


def test_tojson_escapes_neither_html_nor_other_scripts() -> None:
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'


def test_strftime_now_uses_the_clock() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}") == "31 Jan 2026"


def test_tools_are_defined_and_none() -> None:
    assert render("{{ tools is defined and tools is none and documents is none }}") == "True"


def test_namespaces_and_dicts_work() -> None:
    assert render("{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }}{{ dict(a=3).a }}") == "23"


def test_what_the_template_raises_reaches_the_client() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    ["{{ messages[0].content + 1 }}", "{{ 1 / 0 }}", "{{ messages[7].content.x }}", "{{ range(10**9) | list }}"],
)
def test_a_template_that_breaks_is_a_clear_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template") as caught:
        render(source)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}{{ messages.__class__.__mro__[1] }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set n = namespace(__init__=1) %}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(RequestError):
        render(source)


def test_a_developer_message_is_a_system_message_where_the_template_knows_no_other() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert render("{{ messages[0].role }}", messages) == "system"
    assert render("{% if messages[0].role == 'developer' %}D{% endif %}", messages) == "D"
    assert messages == [{"role": "developer", "content": "x"}]


def test_an_invalid_template_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match="not valid Jinja"):
        ChatTemplate("{% if %}", {})
