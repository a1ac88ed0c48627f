"""The identity of a bank, by which a tier that outlives the process tells its blocks from another bank's.

Banks with equal manifests have blocks with equal stamps, and all of them count ids from 0. So a block of one bank could
pass for the block of the same id in another, in a folder that was used before or in a server that both share.
"""

import secrets
from contextlib import suppress

from m3runtime.errors import BankFullError, RecordError, TierReadOnlyError
from m3runtime.storage.home import Home

_RECORD = "identity"


def identify(home: Home) -> str:
    """Give a bank its identity, 32 hex digits drawn at random. Raises what `Home.set_meta` raises."""
    identity = secrets.token_hex(16)
    home.set_meta(_RECORD, identity.encode())
    return identity


def identity_of(home: Home, otherwise: str) -> str:
    """The identity of a bank. A bank of an earlier release gets one now; where that cannot be, it is ``otherwise``."""
    with suppress(RecordError):  # damaged: then it gets another one
        if (stored := home.get_meta(_RECORD)) is not None:
            return stored.decode(errors="replace")
    with suppress(TierReadOnlyError, BankFullError):
        return identify(home)
    return otherwise
