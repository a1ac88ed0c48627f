"""The base of every section of the configuration, and the types that sections share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict

from m3runtime.config.yaml_file import plain


def _as_text(value: object) -> object:
    # YAML reads a folder called 2024 as a number.
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Whole = Annotated[int, Strict()]  # or true would be 1
Count = Annotated[Whole, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
File = Annotated[Path, BeforeValidator(_as_text)]
"""A file or folder; in a configuration file it is relative to that file's folder."""

MAY_BE_LOCAL = "may be local"
FileOrHubName = Annotated[Name, MAY_BE_LOCAL]
"""A name on the hub, or a path if it begins with ``./``, ``../`` or ``~/`` or is absolute."""


class Section(BaseModel):
    """A frozen section that knows all its keys. Loading makes its paths absolute."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )

    replaced: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions, and the advice that the error about each gives."""


class PluginSection(Section):
    """A section that names a plug-in. Keys other than its fields are options of the plug-in's constructor.

    Options stay as they are written; `m3runtime.plugins.construction.construct` checks them.
    """

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The options for the plug-in's constructor."""
        return plain(dict(self.model_extra or {}))  # type: ignore[no-any-return]
