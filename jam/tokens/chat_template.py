"""A chat model's turns, read off its own template: conversations are written as the model learned them.

The template (``chat_template.jinja``, else ``chat_template`` of ``tokenizer_config.json``; Jinja, run by
``run_template.py``) is rendered once with marks for the words. What stands around the marks, cut by the model's
tokenizer with its special tokens, are the ``Turns``.
"""

import json
import signal
import subprocess
from pathlib import Path

import numpy as np

from jam.child import command, environment
from jam.errors import CheckpointError
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import CONTROL, Turns

_ASKED, _ANSWERED, _NEXT = "jamfirst", "jamreply", "jamnext"
_SECONDS = 60  # of the clock; CPU seconds are bounded by the process itself


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
    except ValueError as error:
        raise CheckpointError(f"{folder}: its chat template does not render ({error}); {todo}") from None
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
    except TypeError:  # the library's for such a string
        raise CheckpointError(f"{folder}: its chat template writes half a surrogate pair, no text; {todo}") from None
    except Exception as error:
        if type(error) is not Exception:  # the library raises the bare class where a letter has no token
            raise
        raise CheckpointError(f"{folder}: its tokenizer has no ids for its chat template ({error}); {todo}") from None
    if foreign := next((index for index in (*opening, *assistant, *between) if index >= len(kinds)), None):
        raise CheckpointError(f"{folder}: its chat template writes id {foreign}, config.json has {len(kinds)}; {todo}")
    if not between or kinds[between[0]] != CONTROL:
        raise CheckpointError(f"{folder}: its chat template does not end a reply with a special token; {todo}")
    return Turns(tuple(opening), tuple(assistant), tuple(between[1:])), between[0]


def _render(template: str, **names: object) -> str:
    """What a template writes, in a process of its own. Raises ValueError with the reason when it writes nothing."""
    try:
        done = subprocess.run(
            command(Path(__file__).with_name("run_template.py")),
            input=json.dumps({"template": template, "names": names}).encode(),
            capture_output=True,
            env=environment(),
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"no end after {_SECONDS} seconds") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ValueError("no end within its share of CPU time" if name in ("SIGXCPU", "SIGKILL") else name)
    if done.returncode:
        said = done.stderr.decode(errors="replace").splitlines()[-1:]
        raise ValueError("the process that runs it ended: " + "".join(filter(str.isprintable, *said))[:200])
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["text"]
