"""A chat model's turns, read off its own template: conversations are written as the model learned them.

The template (``chat_template.jinja``, else ``chat_template`` of ``tokenizer_config.json``; Jinja, run in its sandbox as
transformers runs it) is rendered once with marks for the words. What stands around the marks, cut by the model's
tokenizer with its special tokens, are the ``Turns``.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import numpy as np
from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Joiner, Namespace

from jam.errors import CheckpointError
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import CONTROL, Turns

# far above what any template takes for three turns
_MOST, _ITEMS, _STEPS = 100_000, 10_000, 200_000  # numbers and characters; items of a list or range; steps
_WIDTH = re.compile(r"\d{6}")  # of "%0999999d" and "{:999999}"
_ASKED, _ANSWERED, _NEXT = "jamfirst", "jamreply", "jamnext"


class _Bounded(ImmutableSandboxedEnvironment):
    """A sandbox in which no operator, call or filter takes a great number or makes a long text."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False)  # nothing is computed while compiling
        self.filters = {name: _checked(function) for name, function in self.filters.items()}
        self.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        plain = self.filters["format"]
        self.filters["format"] = lambda text, *given, **named: plain(_check_format(text), *given, **named)
        self.filters["bounded"] = _checked(lambda value: value)
        self.globals = {
            "raise_exception": _refuse,
            "range": _range,
            "dict": dict,
            "namespace": Namespace,
            "joiner": Joiner,
        }

    def _parse(self, *given: object) -> nodes.Template:
        tree = super()._parse(*given)
        for joined in list(tree.find_all(nodes.Concat)):  # "~" cannot be intercepted
            inner = nodes.Concat(joined.nodes, lineno=joined.lineno)
            joined.nodes = [nodes.Filter(inner, "bounded", [], [], None, None, lineno=joined.lineno)]
        return tree.set_environment(self)

    def call_binop(self, context: object, operator: str, left: object, right: object) -> object:
        _check(left, right)
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, str | list | tuple) and isinstance(other, int):
                _check(len(one) * other if isinstance(one, str) else len(one) * other * _MOST // _ITEMS)
        if operator == "**" and isinstance(right, int):
            _check(right * 1000)
        if operator == "%":
            _check_format(left)
        return _check(super().call_binop(context, operator, left, right))

    def call(self, context: object, function: object, *given: object, **named: object) -> object:
        if getattr(function, "__name__", "").startswith("format"):
            _check_format(getattr(function, "__self__", None))
        _check(*given, *named.values())
        return _check(super().call(context, function, *given, **named))


def _checked(function: Callable) -> Callable:
    @wraps(function)
    def bounded(*given: object, **named: object) -> object:
        _check(*given, *named.values())
        return _check(function(*given, **named))

    return bounded


def _check(*values: object) -> object:
    """The last value. Raises TemplateError for a number, a text or a list beyond the bounds."""
    for value in values:
        if isinstance(value, int) and abs(value) > _MOST:
            raise TemplateError(f"a number beyond {_MOST}")
        if isinstance(value, str | list | tuple | range):
            bound = _MOST if isinstance(value, str) else _ITEMS
            if len(value) > bound:
                raise TemplateError(f"a text, list or range longer than {bound}")
    return values[-1]


def _check_format(text: object) -> object:
    if isinstance(text, str) and _WIDTH.search(text):
        raise TemplateError("a format with a width of six digits or more")
    return text


def read_template(folder: Path) -> str | None:
    """The folder's chat template. Raises CheckpointError for a file that is damaged."""
    folder = Path(folder)
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        try:
            return alone.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{alone}: {error}; a text in UTF-8 is required, restore the file") from None
    settings = folder / "tokenizer_config.json"
    try:
        found = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
        if isinstance(found, list):  # several by name
            found = next((item["template"] for item in found if item["name"] == "default"), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{settings}: {error!r}; the file is damaged, restore it from its source") from None
    return found if isinstance(found, str) else None


def read_turns(folder: Path, kinds: np.ndarray, special: dict[str, str]) -> tuple[Turns, int] | None:
    """The turns that the folder's chat template writes, and the id that ends a reply; None without a template.

    Args:
        kinds: uint8 [V], what every id is.
        special: ``bos_token`` and so on, as the template may name them.

    Raises:
        CheckpointError: a template that does not render, leaves out or changes what is said, or ends a reply with
            ordinary text.
    """
    template = read_template(folder)
    if template is None:
        return None
    todo = "mend the template, or remove it to use the model without turns"
    said = [("user", _ASKED), ("assistant", _ANSWERED), ("user", _NEXT)]
    messages = [{"role": role, "content": words} for role, words in said]
    try:
        text = _render(template, messages=messages, add_generation_prompt=False, **special)
    except Exception as error:  # a template runs, and can fail in any way that code can
        reason = " ".join(str(error)[:200].split()) or type(error).__name__
        raise CheckpointError(f"{folder}: its chat template does not render ({reason}); {todo}") from None
    places = [text.find(mark) for mark in (_ASKED, _ANSWERED, _NEXT)]
    if -1 in places or sorted(places) != places or any(text.count(words) != 1 for _, words in said):
        raise CheckpointError(f"{folder}: its chat template does not write each turn's words once, in order; {todo}")
    tokenizer = TextTokenizer.load(folder).tokenizer
    tokenizer.encode_special_tokens = False  # the template's own, not a user's text
    pieces = (
        text[: places[0]],
        text[places[0] + len(_ASKED) : places[1]],
        text[places[1] + len(_ANSWERED) : places[2]],
    )
    try:
        opening, assistant, between = (tokenizer.encode(piece, add_special_tokens=False).ids for piece in pieces)
    except Exception as error:  # the library raises TypeError for half a surrogate pair
        raise CheckpointError(f"{folder}: what its chat template writes is no text ({error}); {todo}") from None
    if foreign := next((index for index in (*opening, *assistant, *between) if index >= len(kinds)), None):
        raise CheckpointError(f"{folder}: its chat template writes id {foreign}, config.json has {len(kinds)}; {todo}")
    if not between or kinds[between[0]] != CONTROL:
        raise CheckpointError(f"{folder}: its chat template does not end a reply with a special token; {todo}")
    return Turns(tuple(opening), tuple(assistant), tuple(between[1:])), between[0]


def _render(template: str, **names: object) -> str:
    """What a template writes; text and steps are bounded, as it comes from elsewhere and may never end."""
    left = _STEPS

    def count(*_: object) -> Callable:
        nonlocal left
        left -= 1
        if left < 0:
            raise TemplateError(f"more than {_STEPS} steps")
        return count

    compiled, pieces, length, before = _Bounded().from_string(template), [], 0, sys.gettrace()
    sys.settrace(count)  # the one way to see a loop or a macro that writes nothing
    try:
        for piece in compiled.generate(**names):
            pieces.append(piece)
            length += len(piece)
            if length > _MOST:
                raise TemplateError(f"more than {_MOST} characters")
    finally:
        sys.settrace(before)
    return "".join(pieces)


def _range(*bounds: int) -> range:
    found = range(*bounds)
    _check(found)
    return found


def _refuse(message: str) -> None:
    raise TemplateError(message)
