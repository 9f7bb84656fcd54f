"""A chat model's turns, read off its own template: conversations are written as the model learned them.

The template (``chat_template.jinja``, else ``chat_template`` of ``tokenizer_config.json``; Jinja, run in its sandbox as
transformers runs it) is rendered once with marks for the words. What stands around the marks, cut by the model's
tokenizer with its special tokens, are the ``Turns``.
"""

import json
from pathlib import Path

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from jam.errors import CheckpointError
from jam.tokens.vocabulary import CONTROL, Turns

_ASKED, _ANSWERED, _NEXT = "jamfirst", "jamreply", "jamnext"


def read_template(folder: Path) -> str | None:
    """The folder's chat template. Raises CheckpointError for a damaged tokenizer_config.json."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    settings = folder / "tokenizer_config.json"
    try:
        found = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") if settings.is_file() else None
        if isinstance(found, list):  # several by name
            found = next((item["template"] for item in found if item["name"] == "default"), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    said = [("user", _ASKED), ("assistant", _ANSWERED), ("user", _NEXT)]
    messages = [{"role": role, "content": words} for role, words in said]
    try:
        text = environment.from_string(template).render(messages=messages, add_generation_prompt=False, **special)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its chat template does not render ({error}); {todo}") from None
    places = [text.find(mark) for mark in (_ASKED, _ANSWERED, _NEXT)]
    if -1 in places or sorted(places) != places or any(text.count(words) != 1 for _, words in said):
        raise CheckpointError(f"{folder}: its chat template does not write each turn's words once, in order; {todo}")
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    opening, assistant, between = (
        tokenizer.encode(piece, add_special_tokens=False).ids
        for piece in (
            text[: places[0]],
            text[places[0] + len(_ASKED) : places[1]],
            text[places[1] + len(_ANSWERED) : places[2]],
        )
    )
    if not between or kinds[between[0]] != CONTROL:
        raise CheckpointError(f"{folder}: its chat template does not end a reply with a special token; {todo}")
    return Turns(tuple(opening), tuple(assistant), tuple(between[1:])), between[0]


def _refuse(message: str) -> None:
    raise TemplateError(message)
