"""A checkpoint's chat template: Hugging Face's conventions, inside a sandbox with bounds."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from interlock.core import limits
from interlock.text.errors import ModelFilesError, PromptError
from interlock.text.template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list[dict[str, Any]] = MESSAGES, **variables: Any) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"}, lambda: datetime(2026, 11, 21))
    return template.render(messages, **variables)


def test_conventions_of_hugging_face_hold() -> None:
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny", "trim_blocks and lstrip_blocks"
    assert render("{{ bos_token }}{{ strftime_now('%d %b %Y') }}") == "<s>21 Nov 2026"
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "Hi"}]'
    assert render("{{ '<é>' | tojson }}") == '"<é>"', "no HTML escapes"
    assert render("{% for m in messages %}{% break %}{% endfor %}z") == "z", "loop controls"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hi"
    assert render("{{ add_generation_prompt }} {{ tools is none }}") == "True True"
    assert render("{% for m in messages %}{{ loop.length }}{{ loop.last }}{% endfor %}") == "1True"
    assert render("{{ flag }}", variables={"flag": 1, "self": 2, "messages": 3}) == "1", (
        "variables of the request"
    )


def test_the_templates_own_refusal_is_the_users_error_in_its_words() -> None:
    with pytest.raises(PromptError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages[0].missing.more }}",
    ],
)
def test_nothing_outside_the_sandbox_is_reached(source: str) -> None:
    with pytest.raises(PromptError):
        assert "class" not in render(source)
        raise PromptError("rendered as nothing")


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in 'x' * 99999 %}{% endfor %}{% endfor %}",
        "{% for a in messages | map('length') %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 2 ** (10 ** 9) }}",
        "{{ 2 ** 60 ** 60 ** 60 ** 60 }}",
        "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_work_without_end_is_refused_in_bounded_time(source: str) -> None:
    with pytest.raises(PromptError):
        render(source)


def test_a_template_that_does_not_parse_is_the_models_fault() -> None:
    with pytest.raises(ModelFilesError, match="does not parse"):
        render("{% for %}")


def test_the_budget_belongs_to_one_rendering() -> None:
    template = ChatTemplate("{% for m in messages %}{% endfor %}ok", {}, lambda: datetime(2026, 11, 21))
    many = MESSAGES * (limits.CHAT_TEMPLATE_STEPS_MAX // 2 + 1)
    assert template.render(many) == template.render(many) == "ok"
