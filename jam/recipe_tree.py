"""A recipe's text as a plain tree that remembers where every value came from; overrides laid over it.

Stages: bytes to text, text to ruamel's node tree (which has line and column marks, and still holds duplicate keys
where a dictionary would not), nodes to plain values, ``key=value`` overrides over those. Mistakes are collected, not
raised, so that `jam.recipe` reports them together with those of the schema; only a file that holds no tree at all
raises at once. This file knows no schema.
"""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from jam.errors import RecipeError

Location = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, order=True)
class Origin:
    """Where a value came from: file positions sort before overrides, those before everything else."""

    order: tuple[int, int, int]
    text: str


@dataclass
class Tree:
    """A recipe before validation: plain values, where each came from, and the mistakes met so far."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    marks: dict[Location, Origin] = field(default_factory=dict)
    key_marks: dict[Location, Origin] = field(default_factory=dict)
    overrides: dict[Location, Origin] = field(default_factory=dict)
    mistakes: list[tuple[Origin, str]] = field(default_factory=list)
    unread: set[Location] = field(default_factory=set)
    """Places whose value could not be read; said once, so that the schema need not complain of them again."""

    def mark(self, node: Node) -> Origin:
        line, column = node.start_mark.line + 1, node.start_mark.column + 1
        return Origin((0, line, column), f"{self.name}:{line}:{column}")

    def origin(self, location: Location, key: bool = False) -> Origin:
        """The override that set the value at ``location``, else the file position of it or of its nearest parent."""
        for path, override in reversed(self.overrides.items()):
            if location[: len(path)] == path:
                return override
        if key and location in self.key_marks:
            return self.key_marks[location]
        for size in range(len(location), -1, -1):
            if location[:size] in self.marks:
                return self.marks[location[:size]]
        return Origin((2, 0, 0), self.name)

    def mistake(self, location: Location, message: str, origin: Origin | None = None) -> None:
        dotted = ".".join(map(str, location))
        self.mistakes.append((origin or self.origin(location), f"{dotted}: {message}" if dotted else message))

    def report(self) -> RecipeError:
        """All mistakes as one error: the file's order, then overrides in theirs."""
        ordered = sorted(self.mistakes, key=lambda mistake: mistake[0])
        return RecipeError("\n".join(_one_line(f"{origin.text}: {message}") for origin, message in ordered))


def _one_line(text: str) -> str:
    """Line breaks and terminal codes that a user's key or value may hold, as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def read_tree(path: Path) -> Tree:
    """Parse a recipe file; a file that is no mapping at all is fatal, smaller mistakes are kept in the tree."""
    tree = Tree(str(path))
    node = _compose(_text(path), path)
    if node is None:
        raise RecipeError(f"{path}:1:1: the file is empty; required: a mapping of keys to values; see recipes/")
    if not isinstance(node, MappingNode):
        found = "a list" if isinstance(node, SequenceNode) else "a single value"
        raise RecipeError(f'{tree.mark(node).text}: {found}; required: a mapping; write "key: value" lines')
    tree.values = _plain(node, (), tree)
    return tree


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        siblings = [str(other) for other in sorted(path.parent.glob("*.y*ml"))]
        near = difflib.get_close_matches(str(path), siblings, n=1)
        advice = f'did you mean "{near[0]}"?' if near else "check the path"
        raise RecipeError(f"{path}: no such file; required: a recipe in YAML; {advice}") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; required: a readable recipe file; check the path") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{raw[error.start]:02x} is not UTF-8"
        raise RecipeError(f"{path}:{line}: {found}; required: a UTF-8 file; save it as UTF-8") from None


def _compose(text: str, path: Path) -> Node | None:
    """YAML text to ruamel's node tree, which carries marks and knows duplicate keys where dictionaries do not."""
    try:
        return YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = " ".join(str(part).strip() for part in (error.context, error.problem) if part)
    except ReaderError as error:
        where = f"{path}:{text.count(chr(10), 0, error.position) + 1}"
        problem = f"character {error.character!r} is not allowed"
    except RecursionError:
        where, problem = str(path), "nested too deeply"
    raise RecipeError(f"{where}: YAML syntax: {problem}; required: valid YAML 1.2; mend this line")


def _plain(node: Node, location: Location, tree: Tree) -> Any:
    """One node to plain Python values; marks and mistakes go into ``tree``."""
    tree.marks.setdefault(location, tree.mark(node))
    if node.anchor is not None:  # refused here, an alias can neither nest without end nor name what was not read
        message = f"an anchor or its alias (&{node.anchor}); required: a plain tree; write the value out"
        return _unreadable(tree, location, node, message)
    if isinstance(node, MappingNode):
        return _plain_mapping(node, location, tree)
    if isinstance(node, SequenceNode):
        return [_plain(child, (*location, index), tree) for index, child in enumerate(node.value)]
    return _plain_scalar(node, location, tree)


def _plain_mapping(node: MappingNode, location: Location, tree: Tree) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        mark = tree.mark(key_node)
        if not isinstance(key_node, ScalarNode):
            tree.mistake(location, "a key that is a list or a mapping; required: a word; write a plain key", mark)
            continue
        key = str(key_node.value)
        below: Location = (*location, key)
        if key in values:
            first = tree.key_marks[below].order[1]
            tree.mistake(below, f"duplicate key, first given on line {first}; keep one of the two", mark)
            continue
        tree.key_marks[below] = mark
        values[key] = _plain(value_node, below, tree)
    return values


def _plain_scalar(node: ScalarNode, location: Location, tree: Tree) -> Any:
    kind = str(node.tag).removeprefix(_TAG)
    if kind in ("str", "timestamp"):  # a date is not a type that any recipe has
        if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in str(node.value)):
            return _unreadable(tree, location, node, "a character that no text or path may hold; remove it")
        return str(node.value)
    if kind not in ("null", "bool", "int", "float"):
        return _unreadable(tree, location, node, f"the tag {node.tag}; required: a plain value; remove the tag")
    try:
        value = YAML(typ="safe", pure=True).constructor.construct_object(node)
    except (ValueError, LookupError, YAMLError):  # an explicit tag on a text that does not fit: !!int abc
        text = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
        return _unreadable(tree, location, node, f'"{text}" is no {kind}; remove the tag or mend the value')
    if isinstance(value, int) and abs(value) >= 1 << 64:
        message = f"a whole number of {value.bit_length()} bits; required: one of 64 bits at most; lower it"
        return _unreadable(tree, location, node, message)
    return value


def _unreadable(tree: Tree, location: Location, node: Node, message: str) -> None:
    tree.mistake(location, message, tree.mark(node))
    tree.unread.add(location)


def lay_override(tree: Tree, text: str, origin: Origin) -> None:
    """Lay one ``key=value`` over the tree, making the mappings on the way that the file does not have."""
    key, equals, value_text = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        tree.mistake((), "not of the form key=value; write for example train.steps=400", origin)
        return
    scratch = Tree(text)
    try:
        node = _compose(value_text, Path("value"))
    except RecipeError as error:
        problem = str(error).partition("YAML syntax: ")[2].partition("; required")[0]
        tree.mistake(tuple(parts), f"YAML syntax: {problem}; put special characters in single quotes", origin)
        tree.unread.add(tuple(parts))
        return
    value = None if node is None else _plain(node, tuple(parts), scratch)
    tree.mistakes += [(origin, message) for _, message in scratch.mistakes]
    tree.unread |= scratch.unread
    container: Any = tree.values
    location: Location = ()
    for part in parts[:-1]:
        if isinstance(container, dict) and container.get(part) is None:
            container[part] = {}
            tree.marks[(*location, part)] = origin
        item = _item(container, part)
        if item is None:
            break
        location = (*location, item)
        container = container[item]
    last = _item(container, parts[-1]) if len(location) == len(parts) - 1 else None
    if last is None:
        whole = ".".join(map(str, location))
        tree.mistake(tuple(parts), f'"{whole}" has no items of that name; set "{whole}" as a whole', origin)
        return
    container[last] = value
    tree.overrides.pop((*location, last), None)  # set again: the later one is the one to name
    tree.overrides[(*location, last)] = origin


def _item(container: Any, part: str) -> str | int | None:
    """``part`` as a key or an index of the container; None where it cannot be one."""
    if isinstance(container, dict):
        return part
    if isinstance(container, list) and part.isdecimal() and int(part) < len(container):
        return int(part)
    return None
