"""Recipes: YAML 1.2 files and ``key=value`` overrides, read strictly into frozen pydantic models.

Stages: `jam.recipe_tree` turns the text into a plain tree with a mark for every value and lays the overrides over it;
pydantic checks the whole; every mistake of all stages is reported at once, one line each, as
``recipes/x.yaml:3:23: data.mix.text.wieght: unknown key; did you mean "weight"?``.

YAML 1.2 means that ``1e-4`` is a number and ``on`` a string. Nothing is coerced ("12" is no integer), no key is
dropped, a key given twice is a mistake, and aliases and tags are refused: a recipe is a plain tree. This file knows
no single recipe (each lives beside the work that it describes), opens no other file than the recipe, never imports
what a recipe names, and imports neither torch nor transformers. Relative paths inside a recipe are left as given,
hence relative to the working directory and not to the recipe's folder.
"""

import difflib
import io
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML

from jam.recipe_tree import Location, Origin, Tree, lay_override, read_tree


def _compiles(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:  # a great count, brackets too deep
        raise ValueError(
            f"{_show(value)} is no regular expression ({error}); required: one that Python compiles"
        ) from None
    return value


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression in a recipe."""


class Section(BaseModel):
    """A part of a recipe: unknown keys forbidden, values frozen, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Recipe(Section):
    """Base of every recipe. A subclass has a literal ``kind`` with a default, by which a file names its schema.

    ``aliases`` maps spellings that users bring from other tools to our dotted key; they are never accepted, only
    named in the message about the unknown key.
    """

    aliases: ClassVar[dict[str, str]] = {}


RecipeType = TypeVar("RecipeType", bound=Recipe)


def load_recipe(path: Path | None, model: type[RecipeType], overrides: Sequence[str] = ()) -> RecipeType:
    """Read a recipe file and lay ``key=value`` overrides over it, later ones over earlier ones.

    Args:
        path: a YAML 1.2 file in UTF-8; None for a recipe made of overrides and defaults alone. Relative paths that
            it contains are left as given: they are relative to the working directory.
        model: the schema.
        overrides: ``dotted.key=value``; the value is YAML (``null``, ``[0.9, 0.95]``) and replaces what was there.

    Raises:
        RecipeError: with one line for every mistake found, in the file's order, overrides last.

    >>> class Small(Recipe):
    ...     steps: int = 1
    >>> load_recipe(None, Small, ["steps=20"]).steps
    20
    """
    tree = Tree("command line") if path is None else read_tree(path)
    if not _foreign_kind(tree, model):
        for index, text in enumerate(overrides):
            lay_override(tree, text, Origin((1, index, 0), f'override "{text}"'))
        recipe = _validate(tree, model)
        if recipe is not None and not tree.mistakes:
            return recipe
    raise tree.report()


def recipe_kind(path: Path, kinds: Sequence[str]) -> str:
    """The ``kind`` that a recipe file names, which must be one of ``kinds``.

    Raises:
        RecipeError: the file does not parse, or its kind is absent or unknown.
    """
    tree = read_tree(path)
    kind = tree.values.get("kind")
    if kind not in kinds:
        expected = " or ".join(f'"kind: {name}"' for name in kinds)
        found = "no kind" if kind is None else f"kind {_show(kind)}"
        tree.mistake(("kind",), f"{found}; required: which schema the file follows; write {expected}")
        raise tree.report()
    return str(kind)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; `load_recipe` reads it back to an equal recipe."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = True
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def schema(model: type[Recipe]) -> dict[str, Any]:
    """JSON Schema of a recipe, for editors."""
    return model.model_json_schema()


def _foreign_kind(tree: Tree, model: type[Recipe]) -> bool:
    """Report a file that names another schema: one mistake in place of an unknown key per line."""
    expected = model.model_fields["kind"].default if "kind" in model.model_fields else None
    found = tree.values.get("kind", expected)
    if found == expected:
        return False
    tree.mistake(("kind",), f"found {_show(found)}; required here: {_show(expected)}; is it another command's recipe?")
    return True


def _validate(tree: Tree, model: type[RecipeType]) -> RecipeType | None:
    """The recipe, or None with the mistakes in ``tree``; JSON mode because it is strict and yet takes paths."""
    try:
        return model.model_validate_json(json.dumps(tree.values), strict=True)
    except ValidationError as error:
        reported: dict[Location, dict[str, Any]] = {}
        for detail in error.errors(include_url=False):
            location = _location(detail, tree.values)
            if location not in reported:
                reported[location] = dict(detail)
            elif detail["type"] != "missing":  # a union reports once for each of its members
                reported[location]["msg"] += f" or {detail['msg'].removeprefix('Input should be ')}"
    for location, detail in reported.items():
        unknown = detail["type"] == "extra_forbidden"
        message = _unknown_key(location, model) if unknown else _message(location, detail, model)
        if unknown or not any(place[: len(location)] == location for place in tree.unread):
            tree.mistake(location, message, tree.origin(location, key=unknown))
    return None


def _location(detail: Any, values: Any) -> Location:
    """pydantic's location without the names of union members, which are no part of the recipe."""
    location: Location = ()
    for item in detail["loc"]:
        within_list = isinstance(values, list) and isinstance(item, int) and item < len(values)
        if within_list or (isinstance(values, dict) and item in values):
            values = values[item]
        elif isinstance(values, dict) and detail["type"] == "missing":
            values = None
        else:
            break
        location = (*location, item)
    return location


def _message(location: Location, detail: Any, model: type[Recipe]) -> str:
    """What was found and what is required, from one of pydantic's error details."""
    value = detail["input"]
    if detail["type"] == "missing":
        found = f"a list of {len(value)}, too short" if isinstance(value, list) else "not given"
        return f"{found}; required: {_description(location, model)}"
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    required = detail["msg"].replace("Input should be", "must be").replace("must be an object", "must be a mapping")
    message = f"{required}, found {_show(value)}"
    if detail["type"] == "int_type" and isinstance(value, float) and value.is_integer():
        return f"{message}; write {int(value)}"
    if detail["type"] == "literal_error" and isinstance(value, str):
        return message + _did_you_mean(value, re.findall("'([^']*)'", detail["ctx"]["expected"]))
    return message


def _description(location: Location, model: type[Recipe]) -> str:
    """The schema's own words for a key."""
    for section in _sections_at(model, location[:-1]):
        if str(location[-1]) in section.model_fields:
            return section.model_fields[str(location[-1])].description or "a value"
    return "a value"


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _did_you_mean(word: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=1)
    return f'; did you mean "{near[0]}"?' if near else ""


def _unknown_key(location: Location, model: type[Recipe]) -> str:
    """Name the key that was meant: another tool's spelling, a near miss here, or the same name elsewhere."""
    key = str(location[-1])
    here = [name for section in _sections_at(model, location[:-1]) for name in section.model_fields]
    if key in model.aliases:
        return f'unknown key; did you mean "{model.aliases[key]}"?'
    if near := _did_you_mean(key, here):
        return f"unknown key{near}"
    paths = list(_paths(model))
    elsewhere = [path for path in paths if path.rpartition(".")[2] == key]
    if elsewhere:
        return f'unknown key; did you mean "{elsewhere[0]}"?'
    return f"unknown key; valid here: {', '.join(here)}"


def _sections_at(model: type[BaseModel], location: Location) -> list[type[BaseModel]]:
    """The schema's sections at a location; mappings by name and lists are looked through."""
    sections = [model]
    depth = 0
    while depth < len(location):
        annotations = [
            section.model_fields[str(location[depth])].annotation
            for section in sections
            if str(location[depth]) in section.model_fields
        ]
        sections = [found for annotation in annotations for found in _sections_in(annotation)]
        depth += 2 if any(_is_collection(annotation) for annotation in annotations) else 1
    return sections


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a type holds: itself, or inside ``X | None``, ``dict[str, X]``, ``tuple[X, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)


def _is_collection(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(map(_is_collection, typing.get_args(annotation)))
    return typing.get_origin(annotation) in (dict, list, tuple)


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema, names that the user chooses as ``<name>``."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        inner = f"{prefix}{name}.<name>." if _is_collection(info.annotation) else f"{prefix}{name}."
        for section in _sections_in(info.annotation):
            yield from _paths(section, inner)
