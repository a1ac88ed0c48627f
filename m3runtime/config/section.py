"""What all sections of the configuration have in common."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict


def _as_text(value: object) -> object:
    # YAML reads a folder called 2024 as a number.
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Whole = Annotated[int, Strict()]  # or `yes` would be 1
Count = Annotated[Whole, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]
File = Annotated[Path, BeforeValidator(_as_text)]
"""A file or folder, relative to the file that says so."""


class Section(BaseModel):
    """A section whose keys are all known here."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
        use_attribute_docstrings=True,
    )


class PluginSection(Section):
    """A section that names a plug-in; keys that are not known here are options of its constructor."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The options for the plug-in's constructor: every key that is not a field."""
        return dict(self.model_extra or {})
