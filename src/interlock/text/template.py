"""A model's chat template, rendered in a sandbox with Hugging Face's conventions and within bounds.

The template comes with the checkpoint, the messages come from anybody. Jinja's immutable sandbox keeps both from reaching
Python; what it does not bound is work, and a thread that renders cannot be stopped from outside. So every loop pays for its
items from a budget, `range` and recursion are bounded by the sandbox and the interpreter, and the results of `+`, `~`, `*`
and of the whole are bounded in length: that is a bound in time that does not depend on a clock.
"""

from __future__ import annotations

import contextvars
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from types import MappingProxyType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from interlock.core.limits import CHAT_TEMPLATE_STEPS_MAX, PROMPT_CHARS_MAX
from interlock.text.errors import ModelFilesError, PromptError

MEASURED_OPERATORS = frozenset({"+", "*", "**"})

_steps_left: contextvars.ContextVar[list[int]] = contextvars.ContextVar("interlock_template_steps_left")


class ChatTemplate:
    """Raises `ModelFilesError` when the template does not parse. One instance serves many threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], now: Callable[[], datetime]) -> None:
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationBlock]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelFilesError(f"the model's chat template does not parse: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The prompt's text; `variables` cannot replace what a template is given by convention. Raises `PromptError` in the template's own words, or when a bound is passed."""
        token = _steps_left.set([CHAT_TEMPLATE_STEPS_MAX])
        try:
            pieces = self._template.generate(
                {
                    **variables,
                    **self._special_tokens,
                    "messages": messages,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
            return "".join(bounded_pieces(pieces))
        except PromptError:
            raise
        except jinja2.TemplateError as error:
            raise PromptError(f"the model's chat template refuses these messages: {error}") from error
        except Exception as error:
            # A template may fail on what it does not expect in any way that Python has.
            raise PromptError(
                f"the model's chat template cannot render these messages ({type(error).__name__}: {error})"
            ) from error
        finally:
            _steps_left.reset(token)


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox in which loops and growing values have a bound."""

    intercepted_binops = MEASURED_OPERATORS

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["interlock_steps"] = count_steps
        self.filters["interlock_length"] = check_length

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            loop.iter = _filtered(loop.iter, "interlock_steps")
        _measure_concatenations(tree)
        tree.set_environment(self)
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """An operator of a template, whose result has a bound. Raises `PromptError`."""
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if (
                    isinstance(value, Sized)
                    and isinstance(times, int)
                    and len(value) * times > PROMPT_CHARS_MAX
                ):
                    raise PromptError("the model's chat template makes a value that is too long")
        if operator == "**" and (not _small(right) or (isinstance(left, int) and left.bit_length() > 1024)):
            raise PromptError("the model's chat template raises a number to too high a power")
        return check_length(super().call_binop(context, operator, left, right))


def _small(exponent: Any) -> bool:
    return isinstance(exponent, int | float) and abs(exponent) <= 64


def _filtered(node: jinja2.nodes.Node, name: str) -> jinja2.nodes.Filter:
    assert isinstance(node, jinja2.nodes.Expr)
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _measure_concatenations(node: jinja2.nodes.Node) -> None:
    """Puts each `a ~ b` below this node behind a check of its length: doubled in a loop it would grow without bound."""
    for field, value in node.iter_fields():
        if isinstance(value, jinja2.nodes.Node):
            _measure_concatenations(value)
            if isinstance(value, jinja2.nodes.Concat):
                setattr(node, field, _filtered(value, "interlock_length"))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, jinja2.nodes.Node):
                    _measure_concatenations(item)
                    if isinstance(item, jinja2.nodes.Concat):
                        value[index] = _filtered(item, "interlock_length")


def count_steps(items: Any) -> Any:
    """A loop's items, paid from the rendering's budget; at once where their number is known."""
    if isinstance(items, Sized):
        _pay(len(items))
        return items
    return _counted(items) if isinstance(items, Iterable) else items


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _pay(1)
        yield item


def _pay(steps: int) -> None:
    left = _steps_left.get()
    left[0] -= steps
    if left[0] < 0:
        raise PromptError(
            f"the model's chat template takes more than {CHAT_TEMPLATE_STEPS_MAX} steps on these messages",
            hint="send fewer or shorter messages",
        )


def check_length(value: Any) -> Any:
    """The value as it is. Raises `PromptError` for a text or list above PROMPT_CHARS_MAX."""
    if isinstance(value, str | list | tuple) and len(value) > PROMPT_CHARS_MAX:
        raise PromptError("the model's chat template makes a value that is too long", hint="send less text")
    return value


def bounded_pieces(pieces: Iterator[str]) -> Iterator[str]:
    """The pieces as they are. Raises `PromptError` once they come to more than PROMPT_CHARS_MAX characters."""
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > PROMPT_CHARS_MAX:
            raise PromptError(
                f"these messages become a prompt of more than {PROMPT_CHARS_MAX} characters",
                hint="send fewer or shorter messages",
            )
        yield piece


class GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}` marks assistant text for training; here it is just its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """As Jinja's extensions do: the block's statements, in its place."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' tojson: Jinja's own escapes HTML. (json, not msgspec: the spaces after , and : are part of prompts.)"""
    if indent is not None and (not isinstance(indent, int) or indent > 16):
        raise PromptError("the model's chat template indents JSON by more than 16")
    made = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return "".join(bounded_pieces(made.iterencode(value)))


def raise_exception(message: str) -> None:
    """What a template calls to refuse messages, as the library's does. Raises `TemplateError` with its words."""
    raise jinja2.TemplateError(str(message))
