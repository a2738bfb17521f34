"""Command-line options made from dataclasses: one field is one option, and its default and help text live beside it.

    @dataclass(frozen=True, kw_only=True)
    class Options:
        fraction: float = knob(5e-4, "share of the entries to re-initialise, in [0, 1]")

    given = parse(sys.argv[1:], prog="erase-sd", description="Erase a concept.", options=Options)
    options = dataclasses.replace(preset, **given["options"])

Only what the user typed comes back, so a preset keeps every value that was not asked for. Metadata: `help` is the text
behind the option, `aliases` more names for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import math
import numbers
import os
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from erase_sd.common.errors import UserError


def knob(default: Any, text: str, aliases: tuple[str, ...] = ()) -> Any:
    """Return a dataclass field with the help text that its option shows, and other names for that option."""
    return dataclasses.field(default=default, metadata={"help": text, "aliases": aliases})


def argument(text: str, default: Any = dataclasses.MISSING) -> Any:
    """Return a field that is typed without an option's name, such as the folders that a command reads.

    It is required, or a list that may be left out if it has a default.
    """
    return dataclasses.field(default=default, metadata={"help": text, "positional": True})


def parse(
    argv: Sequence[str], *, prog: str, description: str, preset: Mapping[str, Any] | None = None, **groups: type
) -> dict[str, dict[str, Any]]:
    """Read `argv` into {group: {field: value}}; fields that were not given are left out.

    Every keyword names a dataclass, which becomes a titled group of options. `--field_name` and `--field-name` are the
    same. --help shows the values of `preset` in the place of the fields' defaults. A mistake ends the program with one
    sentence on stderr and exit code 2.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, cls in groups.items():
        _add_group(parser, name, cls, preset or {})
    namespace, unknown = parser.parse_known_args(parser.canonical(argv))
    if unknown:
        parser.reject(unknown[0])
    given: dict[str, dict[str, Any]] = {}
    for name in groups:
        given[name] = {}
    for dest, value in vars(namespace).items():
        group, _, field = dest.partition(".")
        given[group][field] = tuple(value) if isinstance(value, list) else value
    return given


def peek(argv: Sequence[str], name: str, default: str | None = None, aliases: Sequence[str] = ()) -> str | None:
    """Return the value of `--name` before the other options are known: some of them depend on it."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", *(f"--{alias}" for alias in aliases), default=default)
    known, _ = parser.parse_known_args(parser.canonical(argv))
    return getattr(known, name)


def names(cls: type) -> set[str]:
    """Return the names of a dataclass's fields: its options."""
    return {field.name for field in dataclasses.fields(cls)}


def filled(cls: type, values: dict[str, Any]) -> Any:
    """Return the dataclass of those of the values that are its own.

    Raises UserError for one that is none of its choices, of another type, or infinite. Python checks no annotation,
    and a preset or a caller in Python has not been through `parse`.
    """
    annotations = typing.get_type_hints(cls)
    own: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.name not in values:
            continue
        value, choices = values[field.name], _choices(annotations[field.name])
        if choices and value not in (*choices, None):
            raise UserError(f"--{field.name} {value!r} is none of {', '.join(map(str, choices))}")
        _check_number(field.name, value, annotations[field.name])
        own[field.name] = value
    return cls(**own)


def _check_number(name: str, value: Any, annotation: Any) -> None:
    """Raise UserError where a number or a switch is annotated and the value, or one of several, is none."""
    types_of = typing.get_args(annotation) or (annotation,)
    if types.NoneType in types_of and value is None:
        return
    if typing.get_origin(annotation) is tuple and isinstance(value, list | tuple):
        for one in value:
            _check_number(name, one, types_of[0])
        return
    if typing.get_origin(annotation) is tuple and types_of[0] in _NUMBERS:
        raise UserError(f"--{name} {value!r} is no list: give one of numbers")
    for kind, (cls, words) in _NUMBERS.items():
        if kind in types_of and (not isinstance(value, cls) or (kind is not bool and isinstance(value, bool))):
            raise UserError(f"--{name} {value!r} is no {words}: give one")
    if isinstance(value, float) and math.isinf(value):
        raise UserError(f"--{name} {value} is no finite number: give one")


_NUMBERS = {bool: (bool, "truth value"), int: (numbers.Integral, "whole number"), float: (numbers.Real, "number")}


def _choices(annotation: Any) -> list[Any]:
    """Return the values of a Literal, or of the one inside a union with None; nothing for other types."""
    choices: list[Any] = []
    for part in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(part) is typing.Literal:
            choices += typing.get_args(part)
    return choices


def assemble(classes: Iterable[type], preset: dict[str, Any], given: dict[str, Any]) -> list[Any]:
    """Return one instance of every dataclass: what was given wins over the preset, and that over the field's default.

    Raises UserError for a given value that is an option of none of them, and as `filled` and the classes do.
    """
    classes = list(classes)
    known = set().union(*map(names, classes))
    for name in sorted(set(given) - known):
        raise UserError(f"there is no option {name!r} here: see --help")
    return [filled(cls, preset | given) for cls in classes]


class _Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors and without a difference between dashes and underscores."""

    def canonical(self, argv: Sequence[str]) -> list[str]:
        """Return the words with every option's name spelled as the option was declared."""
        declared = {}
        for option in self._option_string_actions:
            declared[option.replace("-", "_")] = option
        words = []
        for word in argv:
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                word = declared.get(name.replace("-", "_"), name) + equals + value
            words.append(word)
        return words

    def reject(self, word: str) -> NoReturn:
        """End the program because `word` is no option, naming the nearest one."""
        if not word.startswith("-"):
            self.error(f"{word!r} does not belong to any option; put quotes around a value with spaces")
        name = word.partition("=")[0]
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        advice = f"did you mean {near[0]}?" if near else "see --help"
        self.error(f"there is no option {name}; {advice}")

    def error(self, message: str) -> NoReturn:
        """Print one sentence, without the usage text, and exit with code 2."""
        self.exit(2, f"error: {message.removeprefix('argument ')}\n")


def _add_group(parser: argparse.ArgumentParser, name: str, cls: type, preset: Mapping[str, Any]) -> None:
    """Add the options of one dataclass under its name, introduced by the first line of its docstring."""
    group = parser.add_argument_group(name.replace("_", " "), (cls.__doc__ or "").strip().partition("\n")[0])
    annotations = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = _default(field)
        text = f"{field.metadata.get('help', '')} {_note(preset.get(field.name, default))}"
        keywords = {"help": text.replace("%", "%%").strip(), **_reader(annotations[field.name])}
        if field.metadata.get("positional"):
            keywords["metavar"] = field.name.upper()
            if default is not dataclasses.MISSING:
                keywords["nargs"] = "*"
            group.add_argument(f"{name}.{field.name}", **keywords)
            continue
        spellings = [f"--{option}" for option in (field.name, *field.metadata.get("aliases", ()))]
        group.add_argument(
            *spellings,
            dest=f"{name}.{field.name}",
            required=default is dataclasses.MISSING,
            **keywords,
        )


def _default(field: dataclasses.Field) -> Any:
    """Return the field's default value, or MISSING when the user has to give one."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _note(default: Any) -> str:
    """Return the default value as it would be typed, to stand behind the help text; "" where there is none to show."""
    if default is dataclasses.MISSING:
        return "(required)"
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    return f"(default: {default})"


def _reader(annotation: Any) -> dict[str, Any]:
    """Return the argparse keywords that read a value of this type; TypeError for a type no option can have."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if annotation in _SCALARS:
        return {"type": _SCALARS[annotation], "metavar": annotation.__name__.upper()}
    if origin is typing.Literal:
        return {"type": _choice(arguments), "metavar": "{" + ",".join(map(str, arguments)) + "}"}
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return {**_reader(arguments[0]), "nargs": "+"}
    if origin in (typing.Union, types.UnionType) and len(arguments) == 2 and arguments[1] is types.NoneType:
        keywords = _reader(arguments[0])
        return {**keywords, "type": _or_none(keywords["type"])} if _takes_one(keywords) else keywords
    raise TypeError(f"an option cannot be of type {annotation}")


def _takes_one(keywords: dict[str, Any]) -> bool:
    """Tell a single value from a switch and from a list, which have no word for "nothing"."""
    return "type" in keywords and "nargs" not in keywords


def _choice(allowed: tuple) -> Callable[[str], Any]:
    """Return a reader of the allowed values, written as text."""
    values = dict(zip(map(str, allowed), allowed, strict=True))

    def read(text: str) -> Any:
        if text not in values:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(values)}")
        return values[text]

    return read


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a reader for which the word "none" switches an optional value off that a preset may have switched on."""

    def read_or_none(text: str) -> Any:
        return None if text == "none" else read(text)

    return read_or_none


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    if math.isinf(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number: give one")
    return value


_SCALARS: dict[type, Callable[[str], Any]] = {int: _whole_number, float: _number, str: str}


STOPPED = (130, 143)  # 128 + SIGINT and SIGTERM
PLACES = {  # what is wrong with a place that the user named, and no fault of the program
    *(errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
}


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Exit with main()'s code; a UserError becomes one sentence on stderr and code 2, Ctrl-C another and code 130."""
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:  # a job that was told to stop, after its checkpoint
        code = stop.code
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except OSError as error:
        if error.errno not in PLACES:
            raise
        print(f"error: {error.filename or 'a file'} cannot be used: {error.strerror}", file=sys.stderr)
        code = 2
    if code in STOPPED:
        print("stopped: the same command goes on where checkpoints or finished parts are", file=sys.stderr)
    sys.exit(code)


def command(
    prog: str, text: str, options: type, work: Callable[[Any], int | None]
) -> Callable[[list[str] | None], int]:
    """Return the `main(argv)` of a program whose options are the fields of one dataclass.

    It reads them, silences the libraries, and returns the exit code of `work(options)`; None counts as 0.
    """
    group = options.__name__.lower()

    def main(argv: list[str] | None = None) -> int:
        given = parse(sys.argv[1:] if argv is None else argv, prog=prog, description=text, **{group: options})
        quiet()
        return work(options(**given[group])) or 0

    return main


def quiet() -> None:
    """Silence what the libraries say while they load; call it before anything imports them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of torchvision, which nothing here needs
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # it prints every prompt that is longer than 77 tokens
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # what diffusers passes to the Hub


def at_least(options: Any, least: int, *fields: str) -> None:
    """Raise UserError for the first of these fields that is below `least` or NaN."""
    for name in fields:
        if not getattr(options, name) >= least:
            raise UserError(f"--{name} {getattr(options, name)} is too small: give {least} or more")


def not_negative(options: Any, signed: frozenset[str] = frozenset()) -> None:
    """Raise UserError for the first number of a dataclass that is negative or NaN, unless it is one of `signed`."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in signed and isinstance(value, int | float) and not value >= 0:
            raise UserError(f"--{field.name} {value} is negative: give 0 or more")
