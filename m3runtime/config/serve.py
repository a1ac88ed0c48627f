"""`ServeConfig`: the section of the HTTP server."""

from typing import Annotated

from pydantic import Field

from m3runtime.config.section import Count, File, Name, Section, Whole
from m3runtime.config.units import Seconds, Size


class ServeConfig(Section):
    """The HTTP server of `m3 serve`, and its limits."""

    address: Name = "127.0.0.1"
    """The address to listen on; any other than this machine's own needs keys."""
    port: Annotated[Whole, Field(ge=0, le=65_535)] = 8000
    """The port to listen on; 0: a free one."""
    name: Name | None = None
    """The name of the model in the API; null: the last part of ``model.path``."""
    keys_file: File | None = None
    """A file of keys, one a line: ``read KEY``, ``write KEY``, or ``KEY`` for both; sources after a key to read
    restrict it, those with spaces between double quotes. `M3_KEYS` has further ones."""
    queue: Annotated[Whole, Field(ge=0)] = 64
    """Most answers that wait for a row, in addition to those in ``model.rows``; further requests get 429."""
    body: Size = 1 << 20
    """Most bytes of a request; longer ones get 413."""
    upload: Size = 64 << 20
    """Most bytes of a request that uploads documents."""
    uploads: File | None = None
    """The folder of uploaded documents, which the bank mirrors; null: ``uploads`` next to the bank's folder."""
    prompt_tokens: Count | None = None
    """Most tokens of a prompt; null: as many as the model has positions and the engine has room for."""
    answer_tokens: Count = 2048
    """Most tokens of an answer; a request for more gets 400."""
    choices: Count = 8
    """Most answers of one request."""
    timeout: Seconds = 300.0
    """Time of a request, after which its answers are cancelled."""
    grace: Seconds = 30.0
    """Time that running answers have to end when the server is stopped."""
