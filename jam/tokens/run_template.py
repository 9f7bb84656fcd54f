"""The process that runs a chat template, and the only file of jam that does.

Run by path, alone: ``python run_template.py``. A template is a program from elsewhere. Jinja's sandbox, in which
transformers runs it, keeps it from Python's objects but not from looping for ever or filling the memory; here it may
use two seconds of CPU and, on Linux, 512 MiB, and may write no file. It imports nothing of jam.

In: JSON ``{"template": ..., "names": {...}}``. Out: JSON ``{"text": ...}`` or ``{"error": ...}``.
"""

import json
import resource
import sys
from datetime import date
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY = 2, 512 << 20
TODAY = date(2025, 1, 1)  # turns are kept as ids: the same model must give the same ones on any day
MOST = 100_000  # characters, far above what any template writes for three turns


def limit() -> None:
    limits = {resource.RLIMIT_CPU: SECONDS, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":  # elsewhere the libraries that are mapped count, or no limit can be set
        limits[resource.RLIMIT_AS] = MEMORY
    for kind, most in limits.items():
        before = resource.getrlimit(kind)[1]
        most = most if before == resource.RLIM_INFINITY else min(most, before)
        resource.setrlimit(kind, (most, most))


def refuse(message: str) -> None:
    raise ValueError(message)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers' filter; Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Generation(Extension):
    """The tag that marks what the assistant says, which changes nothing that is written."""

    tags = {"generation"}  # noqa: RUF012, as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def rendered(template: str, names: dict) -> str:
    """Raises whatever a template can raise, ValueError for a text longer than MOST."""
    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    pieces, length = [], 0
    for piece in environment.from_string(template).generate(**names):
        pieces.append(piece)
        length += len(piece)
        if length > MOST:
            raise ValueError(f"it writes more than {MOST} characters")
    return "".join(pieces)


def main() -> None:
    asked = json.load(sys.stdin)
    limit()
    try:
        answer = {"text": rendered(asked["template"], asked["names"])}
    except Exception as error:  # a template is a program, and can fail in any way that one can
        words = " ".join(str(error)[:200].split())
        answer = {"error": "".join(filter(str.isprintable, words)) or type(error).__name__}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
