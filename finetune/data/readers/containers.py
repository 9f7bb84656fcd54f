"""Files and folders to rows, in order, a little at a time: what a source is follows from its name and its files.

    .jsonl .json        a JSON object a line, or one array    "cats.jsonl:12"
    .txt                a document a line                     "cats.txt:12"
    .csv                a table with a header                 "cats.csv:12"
    .parquet            a table                               "cats.parquet:row 12"
    .tar                webdataset: members that share a name "cats.tar:0012"
    a folder with metadata.jsonl or metadata.csv              an image folder
    a folder that datasets.Dataset.save_to_disk wrote         "cats:row 12"
    another folder                                            its files of one of these kinds, by name

A row is not parsed here beyond its container, so that workers can do that; a row that cannot be read is one whose
payload is the error.
"""

import csv
import tarfile
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from finetune.data.readers.array import elements
from finetune.data.readers.lines import parse_line
from jam.errors import DataError
from jam.tokens.image import MAX_BYTES

BATCH = 64  # rows of a table held at once
IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "caption", "text")
METADATA = ("metadata.jsonl", "metadata.csv")


class Torn(DataError):
    """A container that cannot be read any further: what is lost is not one row, so it is never left out."""


@dataclass(frozen=True)
class Row:
    """``where`` is file and line, for errors; ``payload`` a line of JSON, a row, or what is wrong with it."""

    where: str
    payload: bytes | dict | DataError
    number: int = 0

    def fields(self) -> dict | None:
        """The row; None for a blank line. Raises DataError."""
        if isinstance(self.payload, DataError):
            raise self.payload
        return parse_line(self.payload, self.number) if isinstance(self.payload, bytes) else self.payload


def rows_of(source: Path) -> Iterator[Row]:
    """Every row of a file or folder.

    Raises:
        DataError: nothing there, or nothing that is known.
    """
    if source.is_dir():
        yield from _folder(source)
    elif not source.is_file():
        raise DataError(f"{source}: no such file or folder; give data that is there")
    elif source.suffix.lower() in CONTAINERS:
        yield from CONTAINERS[source.suffix.lower()](source)
    else:
        raise DataError(
            f"{source}: {source.suffix or 'no suffix'} is not read; {', '.join(CONTAINERS)} and folders are"
        )


def files_of(source: Path) -> list[Path]:
    """The files that rows are read from: what a resumed run compares. Images are not among them.

    Raises:
        DataError: a folder without such files.
    """
    if not source.is_dir():
        return [source]
    if (source / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in source.iterdir() if path.is_dir())
        raise DataError(f"{source}: a data set of splits ({', '.join(splits)}); one is required, name its folder")
    if named := [source / name for name in METADATA if (source / name).is_file()]:
        return named
    if _saved(source):
        return sorted(path for path in source.iterdir() if path.is_file())
    return _parts(source)


def _saved(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()


def _parts(folder: Path) -> list[Path]:
    """Raises DataError where there are none, or of two kinds."""
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in CONTAINERS)
    kinds = sorted({path.suffix.lower() for path in found})
    if len(kinds) != 1:
        raise DataError(
            f"{folder}: files of {' and '.join(kinds) or 'no known kind'}; one of {', '.join(CONTAINERS)}, a "
            "metadata.jsonl or a saved data set is required, name the file"
        )
    return found


def _folder(folder: Path) -> Iterator[Row]:
    files = files_of(folder)
    if _saved(folder):
        yield from _arrow(folder)
        return
    for path in files:
        yield from CONTAINERS[path.suffix.lower()](path)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        first = next((raw for raw in lines if raw.removeprefix(b"\xef\xbb\xbf").strip()), b"")
        if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _json_array(path)
            return
        lines.seek(0)
        for number, raw in enumerate(lines, 1):
            yield Row(f"{path}:{number}", raw, number)


def _json_array(path: Path) -> Iterator[Row]:
    number = 1
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for number, element in elements(file):
                yield Row(f"{path}:{number}", element.encode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            yield Row(f"{path}:{number}", Torn(f"not UTF-8 from here on ({error.reason}); save the file as UTF-8"))
        except DataError as error:
            yield Row(f"{path}:{number}", Torn(str(error)))


def _text_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{path}:{number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r\n")
            except UnicodeError as error:
                yield Row(where, DataError(f"not UTF-8 ({error.reason}); save the file as UTF-8"))
                continue
            if line.strip():
                yield Row(where, {"text": line})


def _twice(names: Sequence[str]) -> str | None:
    """A column that is there more than once: a row would keep one of them."""
    return next((name for name in names if list(names).count(name) > 1), None)


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="", errors="strict") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            if twice := _twice(reader.fieldnames or ()):
                raise csv.Error(f"two columns {twice!r:.60}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    yield Row(where, DataError(f"not {len(reader.fieldnames or ())} columns as in the header; mend it"))
                else:
                    yield Row(where, row)
        except (csv.Error, UnicodeError) as error:  # what follows cannot be told apart any more
            yield Row(f"{path}:{reader.line_num + 1}", Torn(f"not readable CSV ({error}); mend the file"))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            if twice := _twice(file.schema_arrow.names):
                raise ValueError(f"two columns {twice!r:.60}")
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:row {number}", row)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # bytes that are no text; odd dates
        reason = " ".join(str(error).split())[:200]
        yield Row(f"{path}:row {number + 1}", Torn(f"not readable parquet ({reason}); mend the file or fetch it again"))


def _arrow(folder: Path) -> Iterator[Row]:
    """Images stay as they are stored, bytes or paths: decoding is ours, with its limits."""
    import datasets

    number = 0
    try:
        for table in datasets.load_from_disk(str(folder)).with_format("arrow").iter(BATCH):
            for row in table.to_pylist():
                number += 1
                yield Row(f"{folder}:row {number}", row)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        yield Row(f"{folder}:row {number + 1}", Torn(f"not a readable data set ({reason}); save it again"))


def _tar(path: Path) -> Iterator[Row]:
    """Members that share a name up to its first dot make a row, keyed by what follows; nothing is ever extracted."""
    held, key = {}, None

    def row() -> Row:
        bad = next((value for value in held.values() if isinstance(value, DataError)), None)
        return Row(f"{path}:{key}", bad or held)

    try:
        with tarfile.open(path, "r|") as archive:  # a plain tar, read once from front to back
            while (member := archive.next()) is not None:
                archive.members = []  # else it remembers all of them
                if member.isdir():
                    continue
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                own = str(name.parent / stem)
                if key is not None and own != key:
                    yield row()
                    held = {}
                key, suffix = own, suffix.lower()
                problem = _member_problem(member, name) or _second(suffix, held)
                if problem:
                    held[suffix] = DataError(f"member {member.name!r:.200}: {problem}; mend the archive")
                elif suffix in (*IMAGES, *TEXTS, "json"):
                    held[suffix] = _member(suffix, archive.extractfile(member).read())
        if key is not None:
            yield row()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        where = f"{path}:{key or 'start'}"
        yield Row(where, Torn(f"not a readable tar from here on ({error}); fetch it again"))


def _member_problem(member: tarfile.TarInfo, name: PurePosixPath) -> str | None:
    if not member.isfile():
        return "a link or device; plain files are read"
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        return "a path that leads out of the archive"
    return f"{member.size} bytes, at most {MAX_BYTES} are read" if member.size > MAX_BYTES else None


def _second(suffix: str, held: Container[str]) -> str | None:
    """Which of two images or captions of a row was meant cannot be known."""
    kind = next((kind for kind in (IMAGES, TEXTS) if suffix in kind), (suffix,))
    other = next((one for one in kind if one in held), None)
    if other is None:
        return None
    return f"two members .{suffix}" if other == suffix else f"beside one .{other}; one of them is required"


def _member(suffix: str, data: bytes) -> object:
    if suffix in IMAGES:
        return data
    try:
        return data.decode("utf-8").strip() if suffix in TEXTS else parse_line(data, 1)
    except (UnicodeError, DataError) as error:
        reason = error if isinstance(error, DataError) else f"not UTF-8 ({error.reason}); save it as UTF-8"
        return DataError(f"member .{suffix}: {reason}")


CONTAINERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".txt": _text_lines,
    ".csv": _csv,
    ".parquet": _parquet,
    ".tar": _tar,
}
