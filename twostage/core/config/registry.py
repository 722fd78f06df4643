"""Open unions of configuration groups, to which plugins add types of their own (docs/extending.md).

A plugin is a module that registers types when it is imported. A config names it, the environment, or an entry point of
an installed package.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, TypeGuard, TypeVar, get_args

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, SchemaValidator, core_schema

from twostage.core.errors import InputError

__all__ = ["PLUGINS_VARIABLE", "PLUGIN_GROUP", "OpenUnion", "check_plugins", "is_open", "load_plugins", "plugins_of"]

PLUGIN_GROUP = "twostage.plugins"
"""The entry point group of installed plugins; each entry point names a module."""
PLUGINS_VARIABLE = "TWOSTAGE_PLUGINS"
"""The environment variable with the modules of other plugins, separated by commas."""
OWN_PACKAGES = ("twostage", "stage1_tokenizer", "stage2_prior", "pipelines")
Group = type[BaseModel]
Member = TypeVar("Member", bound=Group)


class OpenUnion:
    """Makes a section the base class of a union, whose members are told apart by their `type`.

    A section that inherits from this class is the union: it declares what all members share, and fields are annotated
    with it. The members are subclasses of the union, each with a `type` of its own:

        class ShapeConfig(OpenUnion, Section):
            def area(self) -> float: ...

        @ShapeConfig.register
        class CircleConfig(ShapeConfig):
            type: Literal["circle"] = "circle"
    """

    type: Any
    """The name of the member in a config."""
    registered: ClassVar[dict[str, Group]]
    """The members so far, by `type`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if is_open(cls):
            cls.registered = {}

    @classmethod
    def register(cls, member: Member) -> Member:
        """Adds a member to the union; also a class decorator. A class that is defined again replaces the first one.

        Raises:
            ValueError: ``member`` has no `type` of its own, or another class has the same.
        """
        field = member.model_fields.get("type")
        names = get_args(field.annotation) if field else ()
        if len(names) != 1 or cls not in member.__mro__:
            raise ValueError(
                f"{member.__name__}: expected a subclass of {cls.__name__} with a line type: Literal['name'] = 'name'"
            )
        earlier = cls.registered.get(names[0], member)
        if (earlier.__module__, earlier.__qualname__) != (member.__module__, member.__qualname__):
            taken_by = f"{earlier.__module__}.{earlier.__qualname__}"
            raise ValueError(f"{member.__name__}: the type {names[0]!r} belongs to {taken_by}; choose another name")
        cls.registered[names[0]] = member
        return member

    @classmethod
    def members(cls) -> list[Group]:
        """All members of the union, those of installed plugins included.

        Raises:
            InputError: a plugin cannot be imported.
        """
        _import_plugins()
        return list(cls.registered.values())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not is_open(cls):
            return handler(source)

        def validate(value: Any) -> Any:  # the members are looked up then: most are registered later than this
            return _validator(tuple(cls.members())).validate_python(value)

        return core_schema.no_info_plain_validator_function(validate)


def is_open(annotation: Any) -> TypeGuard[type[OpenUnion]]:
    """Whether ``annotation`` is an open union, not one of its members."""
    return isinstance(annotation, type) and OpenUnion in annotation.__bases__


@cache
def _validator(members: tuple[Group, ...]) -> SchemaValidator:
    choices = {
        get_args(member.model_fields["type"].annotation)[0]: member.__pydantic_core_schema__ for member in members
    }
    return SchemaValidator(core_schema.tagged_union_schema(choices, discriminator="type"))


# --- plugins --------------------------------------------------------------------------------------------------------


def load_plugins(names: Iterable[str], beside: Path | None = None) -> None:
    """Imports modules that register types. They are looked for on Python's path, then in the folder ``beside``, then
    in the current folder.

    Raises:
        InputError: there is no such module, or it cannot be imported.
    """
    for name in names:
        folders = list(dict.fromkeys(str(folder.absolute()) for folder in (beside, Path.cwd()) if folder))
        sys.path += [folder for folder in folders if folder not in sys.path]
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name in (name, name.partition(".")[0]):
                raise InputError(
                    f"plugins {name!r}: no such module; expected {name.partition('.')[0]}.py in "
                    f"{' or '.join(folders)}, or an installed module. Fix the name, without .py"
                ) from None
            raise InputError(f"plugins {name!r}: cannot be imported ({_why(error)}). Fix it") from error


def check_plugins(names: Iterable[str], where: str | Path) -> None:
    """Checks that the modules whose types a stored model uses are imported. A model never imports them itself.

    Raises:
        InputError: one of them is not.
    """
    _import_plugins()
    for name in names:
        if name not in sys.modules:
            raise InputError(
                f"{where}: needs the plugin {name!r}, which is not loaded. Set the environment variable "
                f"{PLUGINS_VARIABLE}={name} and start in the folder of {name.partition('.')[0]}.py, install it as a "
                f"package, or, in Python, import {name} first"
            )


def plugins_of(config: Any) -> list[str]:
    """The modules outside of twostage that define the types in a configuration."""
    values = list(vars(config).values()) if isinstance(config, BaseModel) else config
    found = {type(config).__module__} if isinstance(config, OpenUnion) else set()
    for value in values:
        if isinstance(value, BaseModel | list | tuple):
            found |= set(plugins_of(value))
    return sorted(name for name in found if name.partition(".")[0] not in OWN_PACKAGES)


@cache
def _waiting() -> list[EntryPoint | str]:
    """The plugins that this process has not imported yet: installed ones, and the modules of $TWOSTAGE_PLUGINS."""
    named = os.environ.get(PLUGINS_VARIABLE, "").split(",")
    return [*entry_points(group=PLUGIN_GROUP), *filter(None, map(str.strip, named))]


def _import_plugins() -> None:
    while _waiting():
        plugin = _waiting().pop(0)
        try:
            if isinstance(plugin, str):
                load_plugins([plugin])
            else:
                plugin.load()
        except InputError:
            _waiting().insert(0, plugin)
            raise
        except Exception as error:
            assert isinstance(plugin, EntryPoint)
            _waiting().insert(0, plugin)
            package = plugin.dist.name if plugin.dist else plugin.value
            raise InputError(
                f"plugin {plugin.name!r}: cannot be imported ({_why(error)}). Fix it, or run: pip uninstall {package}"
            ) from error


def _why(error: BaseException) -> str:
    """The error in one line, with the place in the plugin that raised it."""
    files = [(file, line) for file, line, *_ in traceback.extract_tb(error.__traceback__) if not file.startswith("<")]
    file, line = files[-1]
    at = "" if file in (__file__, importlib.__file__, metadata.__file__) else f"{file}, line {line}: "
    return at + " ".join(f"{type(error).__name__}: {error}".split())
