"""Open unions of configuration groups: installed packages can add types of their own (docs/extending.md)."""

from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from typing import Annotated, Any, ClassVar, TypeGuard, TypeVar, get_args

from pydantic import BaseModel, Field, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from twostage.core.errors import InputError

__all__ = ["PLUGIN_GROUP", "OpenUnion", "is_open"]

PLUGIN_GROUP = "twostage.plugins"
"""The entry point group of plugins: each entry point names a module that registers types when it is imported."""
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
            return _adapter(tuple(cls.members())).validate_python(value)

        return core_schema.no_info_plain_validator_function(validate)


def is_open(annotation: Any) -> TypeGuard[type[OpenUnion]]:
    """Whether ``annotation`` is an open union, not one of its members."""
    return isinstance(annotation, type) and OpenUnion in annotation.__bases__


@cache
def _adapter(members: tuple[Group, ...]) -> TypeAdapter[Any]:
    union: Any = reduce(or_, members)
    return TypeAdapter(Annotated[union, Field(discriminator="type")])  # type: ignore[reportInvalidTypeForm]


@cache
def _waiting() -> list[EntryPoint]:
    """The installed plugins that this process has not imported yet."""
    return list(entry_points(group=PLUGIN_GROUP))


def _import_plugins() -> None:
    while _waiting():
        plugin = _waiting().pop(0)
        try:
            plugin.load()
        except Exception as error:
            _waiting().insert(0, plugin)
            package = plugin.dist.name if plugin.dist else plugin.value
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"plugin {plugin.name!r}: cannot be imported ({why}). Fix it, or run: pip uninstall {package}"
            ) from error
