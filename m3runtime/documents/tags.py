"""Tags: metadata that all places of a source get when it is written."""

from collections.abc import Mapping

from m3runtime.errors import InputError

RESERVED = ("source", "record", "title", "url", "expires")
"""Names of metadata that have a meaning of their own."""
_LONGEST = 1000


def checked(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags as they are. Raises `InputError` for a name or a value that a tag cannot have."""
    for name, value in tags.items():
        if not name.strip() or name in RESERVED:
            raise InputError(f"a tag cannot be named {name!r}; reserved are {', '.join(RESERVED)}")
        if len(name) > _LONGEST or len(value) > _LONGEST:
            raise InputError(f"the tag {name[:40]!r} is longer than {_LONGEST} characters")
    return dict(tags)
