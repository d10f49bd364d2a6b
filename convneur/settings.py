"""Settings: any tree of dataclasses, filled from YAML files and then from flags, `--section.key value`.

A key is written with dots, `section.key`. Sections are dataclasses, and every value is checked against its field's type
before anything is built from it. A field of type dict is a free mapping: its metadata has an `example` of a key below
it, and may have `instead_of`, names of keys that people look for elsewhere and what to tell them. A file may name
another to start from, `include: FILE`, beside its sections.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields, is_dataclass
from difflib import SequenceMatcher
from functools import cache
from math import isfinite
from pathlib import Path
from reprlib import Repr
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from convneur.data.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

INCLUDE = "include"
NOT_FINITE = re.compile(r"[-+]?(nan|inf(inity)?)", re.IGNORECASE)
LONG_YAML = 1 << 14
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80
Tree = dict[str, Any]
_Section = TypeVar("_Section", bound="DataclassInstance")


def load_as(schema: type[_Section], config_files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> _Section:
    """A dataclass of its fields' defaults, then what the files say, then the overrides; the last one wins.

    config_files: YAML files, each with any part of the sections.
    overrides: words of a command line, `--section.key value` or `--section.key=value`.

    Raises InputError where a file can't be read, a key is unknown or a value doesn't fit its type.
    """
    files = (source for path in config_files for source in read_file(Path(path)))
    return resolve(schema, [*files, *_parse_overrides(overrides, schema)])


def resolve(schema: type[_Section], sources: Iterable[tuple[str, Tree]]) -> _Section:
    """The same from what `read_file` returns: raw values, each tree with what makes its keys findable."""
    merged: Tree = {}
    for where, tree in sources:
        merged = _merge(merged, _typed(tree, schema, where, schema))
    return _build(schema, merged, "")


def yaml_text(section: "DataclassInstance") -> str:
    """Every key of a dataclass, as YAML that reads back to an equal one."""
    return yaml.dump(asdict(section), Dumper=_Dumper, sort_keys=False)


def config_keys(section: type, prefix: str = "") -> Iterator[str]:
    """All keys, in the order of their fields, each section before its own keys."""
    for name, hint in get_type_hints(section).items():
        yield prefix + name
        if _is_section(hint):
            yield from config_keys(hint, f"{prefix}{name}.")


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The key that was probably meant, if any is close; a right name in the wrong section counts as close."""

    def closeness(candidate: str) -> tuple[float, float]:
        whole = SequenceMatcher(None, key, candidate).ratio()
        name = SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(whole, name), whole

    best = max(keys, key=closeness, default=None)
    return best if best is not None and closeness(best) > (0.6,) else None


# Reading sources. Each is a tree of raw values and a prefix that makes its keys findable: "FILE: " or "--".


def read_file(path: Path, including: tuple[Path, ...] = ()) -> Iterator[tuple[str, Tree]]:
    """What a file includes, by paths relative to it, and then the file itself, which therefore wins.

    including: the files that have led to this one. Raises InputError where one can't be read, or holds no sections.
    """
    where = f"{including[-1]}: include: {path}" if including else str(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{where}: can't be read ({error.strerror}), expected a YAML file") from error
    tree = _yaml(text, f"{path}: not valid YAML")
    if not isinstance(tree, dict | None):
        raise InputError(f"{path}: holds {_SHORT.repr(tree)}, expected sections such as 'model:' with keys below them")
    tree = tree or {}
    if INCLUDE in tree:
        included = tree.pop(INCLUDE)
        if not isinstance(included, str):
            raise InputError(f"{path}: {INCLUDE} is {included!r}, expected a path, relative to this file")
        if path.resolve() in [file.resolve() for file in including]:
            raise InputError(f"{where}: these files include each other, expected an end to it")
        yield from read_file(path.parent / included, (*including, path))
    yield f"{path}: ", tree


def _parse_overrides(words: Iterable[str], schema: type["DataclassInstance"]) -> Iterator[tuple[str, Tree]]:
    words = iter(words)
    for word in words:
        if not word.startswith("--"):
            raise InputError(f"{word!r} belongs to no flag, expected --section.key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise InputError(f"--{key} has no value, expected --{key} VALUE, or --{key}=VALUE if it starts with --")
        first, *rest = key.split(".")
        free = get_origin(_hints(schema).get(first)) is dict
        if not free and key not in config_keys(schema):
            raise _unknown("--", key, schema)
        value: Any = text
        if free:  # free values have no type to read them by
            value = _yaml(text.encode(errors="surrogateescape"), f"--{key} is {text!r}, which is not valid YAML")
        for name in reversed(rest):
            value = {name: value}
        yield "--", {first: value}


class _Loader(yaml.SafeLoader):
    """YAML where `1e-3` is a number, as in YAML 1.2, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys, as they are written, are all different."""
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{name!r} is given twice", problem_mark=node.start_mark
                )
        return yaml.constructor.SafeConstructor.construct_mapping(self, node, deep)


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml where PyYAML has it, a tenth of the time; it recurses on the stack, so for short texts."""

    construct_mapping = _Loader.construct_mapping


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number."""


for _class in (_Loader, _FastLoader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def _yaml(text: bytes, complaint: str) -> Any:
    try:
        return yaml.load(text, _FastLoader if len(text) < LONG_YAML else _Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # the others: 2026-02-30, [[[[...
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        last = text.count(b"\n") + 1  # libyaml points beyond what ends too early
        where = f"line {min(mark.line + 1, last)}: " if mark else ""
        raise InputError(f"{complaint} ({where}{problem})") from error


def _merge(base: Tree, extra: Tree) -> Tree:
    """`base` with the values of `extra`, mapping by mapping."""
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


# Types.


_hints: Callable[[type], dict[str, Any]] = cache(get_type_hints)


def _is_section(hint: Any) -> TypeGuard[type["DataclassInstance"]]:
    return isinstance(hint, type) and is_dataclass(hint)


def _typed(
    tree: Tree, section: type["DataclassInstance"], where: str, schema: type["DataclassInstance"], prefix: str = ""
) -> Tree:
    """The tree with every value converted to the type of its field; InputError for the first one that can't be.

    section: the part of `schema` that it is a tree of, whose keys begin with `prefix`.
    """
    hints = _hints(section)
    typed: Tree = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise _unknown(where, key, schema)
        hint = hints[name]
        if _is_section(hint) or get_origin(hint) is dict:
            if not isinstance(value, dict | None):
                raise InputError(
                    f"{where}{key} is {value!r}, expected keys below it, such as {key}.{_example(section, name)}"
                )
            value = value or {}
            if not _is_section(hint):
                _check_finite(_without_words(value), where + key, "a number")
            typed[name] = _typed(value, hint, where, schema, f"{key}.") if _is_section(hint) else value
        else:
            typed[name] = _converted(value, hint, where + key)
    _build(section, typed, where)
    return typed


def _converted(value: Any, hint: Any, label: str) -> Any:
    if _fits_as_it_is(value, hint):
        _check_finite(value, label, _expected(hint))
        return value
    try:
        converted = _converter(hint).parse_object({"value": value}).value
        fits = converted is not None or NoneType in get_args(hint)  # jsonargparse takes null for any type
    except (jsonargparse.ArgumentError, OverflowError):
        fits = False
    if not fits:
        raise InputError(f"{label} is {value!r}, expected {_expected(hint)}")
    _check_finite(converted, label, _expected(hint))
    return converted


def _check_finite(value: Any, label: str, expected: str) -> None:
    """Refuses nan and infinity, which no setting means, wherever in a value they are."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_finite(part, f"{label}.{key}", expected)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_finite(part, label, expected)
    elif isinstance(value, float) and not isfinite(value):
        raise InputError(f"{label} is {value}, expected {expected}; it can't be nan or infinite")


def _without_words(value: Any) -> Any:
    """A free value with `nan` and `inf`, which are numbers to DeepSpeed but words to YAML, as numbers."""
    if isinstance(value, dict):
        return {key: _without_words(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_words(part) for part in value]
    return float(value) if isinstance(value, str) and NOT_FINITE.fullmatch(value) else value


def _fits_as_it_is(value: Any, hint: Any) -> bool:
    """Whether a value is of just this type, as nearly all of a saved configuration are: jsonargparse takes its time."""
    if hint in (int, float, bool, str):
        return type(value) is hint
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) is list:
        return type(value) is list and all(_fits_as_it_is(item, get_args(hint)[0]) for item in value)
    return value is None and NoneType in get_args(hint)


@cache
def _converter(hint: Any) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _build(section: type[_Section], tree: Tree, where: str) -> _Section:
    """The dataclass of a section from typed values; what its own checks say is bad input."""
    hints = _hints(section)
    values = {
        name: _build(hints[name], value, where) if _is_section(hints[name]) else value for name, value in tree.items()
    }
    try:
        return section(**values)
    except ValueError as error:
        raise InputError(f"{where}{error}") from error


def _unknown(where: str, key: str, schema: type["DataclassInstance"]) -> InputError:
    hint = "`convneur train --help` lists them"
    if nearest := nearest_key(key, config_keys(schema)):
        hint = f"did you mean {'--' if where == '--' else ''}{nearest}?"
    for field in fields(schema):
        hint = field.metadata.get("instead_of", {}).get(key.rpartition(".")[2], hint)
    return InputError(f"{where}{key} is not a configuration key; {hint}")


def _expected(hint: Any) -> str:
    """A type in words."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text, in quotes if YAML takes it for something else",
        NoneType: "null",
    }
    if hint in words:
        return words[hint]
    if get_origin(hint) is Literal:
        return f"one of {', '.join(repr(choice) for choice in get_args(hint))}"
    if get_origin(hint) is list:
        return f"a list, each {_expected(get_args(hint)[0])}"
    if get_origin(hint) is tuple:
        return f"a list of {len(get_args(hint))}, each {_expected(get_args(hint)[0])}"
    return " or ".join(_expected(part) for part in get_args(hint))


def _example(section: type["DataclassInstance"], name: str) -> str:
    """A key below a field that is a section or a free mapping."""
    hint = _hints(section)[name]
    if _is_section(hint):
        return fields(hint)[0].name
    return str(next(field.metadata["example"] for field in fields(section) if field.name == name))
