"""The process that runs a chat template, and the only file of jam that does.

Run by path, alone: ``python run_template.py``. A template is a program from elsewhere. Jinja's sandbox, in which
transformers runs it, keeps it from Python's objects but not from looping for ever or filling the memory; here it may
use two seconds of CPU and, on Linux, 512 MiB, and may write no file. It imports nothing of jam.

In: JSON ``{"template": ..., "names": {...}}``. Out: JSON ``{"text": ...}`` or ``{"error": ...}``.
"""

import json
import resource
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY = 2, 512 << 20
MOST = 100_000  # characters, far above what any template writes for three turns


def limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    if sys.platform == "linux":  # elsewhere the libraries that are mapped count, or no limit can be set
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))


def refuse(message: str) -> None:
    raise ValueError(message)


def rendered(template: str, names: dict) -> str:
    """Raises whatever a template can raise, ValueError for a text longer than MOST."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
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
