"""Every error that m3runtime raises on purpose.

::

    M3Error
    ├── ConfigError             the YAML file or an override is wrong
    ├── InputError              a text, file or argument that cannot be used
    ├── PluginError             a backend is unknown, broken or not installed
    ├── BankError               the bank as a whole
    │   ├── BankMissingError    there is no bank at that path
    │   ├── BankFormatError     written by another format version
    │   ├── BankMismatchError   written by another model, tokenizer, spec, codec or embedder
    │   ├── BankBusyError       another process, or this one, has it open for writing
    │   └── BankFullError       the home has reached its configured limit, or the drive is full
    ├── BlockError              bytes that are not the block they should be
    ├── StoreFullError          leased memories fill the memory store
    ├── CodecError              a codec that is untrained, unreadable or does not fit the spec
    ├── IndexFileError          an index file that cannot be used (it is rebuilt from the home)
    └── TierError               a tier that failed
        ├── RecordError         a record of the home that is damaged: a reference, an embedding, metadata
        ├── TierClosedError     a tier used after ``close``
        └── TierReadOnlyError   a write to a tier opened for reading

A miss is never an error: see ``m3runtime.storage.tier``.
"""


class M3Error(Exception):
    """Base of all errors; its message is one line that names the thing at fault and what to do."""


class ConfigError(M3Error):
    """The configuration is wrong."""


class InputError(M3Error):
    """A text, file or argument cannot be used."""


class PluginError(M3Error):
    """A backend is unknown, broken or not installed."""


class BankError(M3Error):
    """The bank as a whole cannot be used."""


class BankMissingError(BankError):
    """There is no bank at the given path."""


class BankFormatError(BankError):
    """The bank was written by a format version that this release does not read."""


class BankMismatchError(BankError):
    """The bank was written by another model, tokenizer, spec, codec or embedder."""


class BankBusyError(BankError):
    """The bank is open for writing already. Any number of processes may read it, one may write."""


class BankFullError(BankError):
    """The home has reached its configured limit, or the drive is full. Nothing of the batch was written."""


class BlockError(M3Error):
    """Bytes that are not the block they should be: damaged, of another bank, or of another id."""


class StoreFullError(M3Error):
    """Leased memories fill the memory store, so a recall finds no room. See ``recall.decoded``."""


class CodecError(M3Error):
    """A codec is untrained, unreadable, or does not fit the spec."""


class IndexFileError(M3Error):
    """An index file cannot be used; the index is a cache and is rebuilt from the home."""


class TierError(M3Error):
    """A tier failed. Never raised for a block that simply is not there."""


class RecordError(TierError):
    """A record of the home is damaged. ``id`` is the memory that it belongs to, or None."""

    def __init__(self, message: str, id: int | None = None) -> None:
        super().__init__(message)
        self.id = id


class TierClosedError(TierError):
    """A tier was used after ``close``."""


class TierReadOnlyError(TierError):
    """A write to a tier that was opened for reading."""
