"""Chat templates and detokenising agree with transformers, on features that published templates use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.text.detokenizer import Detokenizer
from coordinator.text.model import load_text_model
from tests.checkpoints import CHAT_TEMPLATE, write_tokenizer

transformers = pytest.importorskip("transformers")

CHAT = [
    {"role": "system", "content": "Be <brief> & kind.\n"},
    {"role": "user", "content": "  Grüße 你好 🙂  "},
    {"role": "assistant", "content": "<think>hm</think>\n\nYes"},
    {"role": "user", "content": "'quoted' \"text\""},
]

TEMPLATES = {
    "of the tests' own models": CHAT_TEMPLATE,
    "with whitespace control and a namespace": """
{%- set ns = namespace(found=false, last=-1) -%}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.found = true %}{% endif %}
    {%- set ns.last = loop.index0 %}
{%- endfor -%}
{{- bos_token }}{{ ns.found }} {{ ns.last }}
  {% for message in messages[::-1] %}
  {{ '<|' ~ message['role'] ~ '|>' }}
    {{- message.content | trim | replace('"', "'") }}{{ eos_token }}
  {% if loop.first %}first{% elif loop.index is divisibleby 2 %}even{% endif %}
  {% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
""",
    "with JSON, splitting and loop controls": """
{%- if tools %}TOOLS{% endif -%}
{%- if not date_string is defined %}{% set date_string = '1 Jan' %}{% endif -%}
{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{{ message | tojson }} {{ message | tojson(indent=2) }} {{ message.content.split('</think>')[-1].lstrip('\n') }}
{% if message.content.startswith('<think>') %}{% break %}{% endif %}
{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }} {{ date_string }}
""",
    "with a macro, generation marks and undefined values": """
{%- macro say(role, content) %}[{{ role }}]{{ content }}{{ undefined_thing }}{% endmacro -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' %}{% generation %}{{ say('a', message['content']) }}{% endgeneration %}
{%- else %}{{ say(message['role'], message['content']) }}{{ message.get('name', '-') }}{% endif %}
{%- endfor %}{{ dict(a=1) }}{{ '%s/%d' | format('x', 3) }}
""",
}


@pytest.fixture(params=TEMPLATES.values(), ids=list(TEMPLATES))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": request.param}))
    return tmp_path


def test_a_chat_gives_the_same_text_and_the_same_tokens(folder: Path) -> None:
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_text_model(folder)
    assert ours.template is not None
    text = ours.template.render(CHAT)
    assert text == theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert list(ours.tokenizer.encode(text, add_special_tokens=False)) == ids


def test_plain_texts_and_whole_decodings_are_the_same(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_text_model(tmp_path)
    text = "Grüße <|end|> 你好 🙂 and more"
    assert list(ours.tokenizer.encode(text, add_special_tokens=True)) == theirs.encode(text)
    ids = [(at * 7919) % 384 for at in range(300)]
    detokenizer = Detokenizer(ours.tokenizer, continues=False)
    streamed = "".join(detokenizer.push(id) for id in ids) + detokenizer.finish()
    assert streamed == theirs.decode(ids, skip_special_tokens=True)
