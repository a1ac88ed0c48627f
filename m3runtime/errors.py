"""Every error that m3runtime raises on purpose.

A program that catches `M3Error` catches them all. The message is one line: it names the file, key or id at fault, and
what to do about it. A cache miss is never an error; it is a value (see `m3runtime.storage.tier`).

    M3Error
    ├── ConfigError             the configuration is wrong
    ├── InputError              a text, file or argument cannot be used
    │   └── PromptTooLongError  more positions or room than the model has
    ├── PluginError             a plug-in is unknown, broken or not installed
    ├── BankError               the bank as a whole cannot be used
    │   ├── BankMissingError    no bank at that path
    │   ├── BankFormatError     a format version that this release does not read
    │   ├── BankMismatchError   another model, tokenizer, spec, codec or embedder
    │   ├── BankBusyError       already open for writing
    │   └── BankFullError       no room for the batch
    ├── BlockError              bytes are not the expected block
    ├── ForkedError             a runtime is used in a process that was forked after it was opened
    ├── StoreFullError          leased memories fill the memory store
    ├── EngineClosedError       a request to an engine after `close`
    ├── EncoderError            processes that encode for a writer die again and again
    ├── RemoteError             an engine at a URL is not reached, refuses us, or breaks off
    ├── CodecError              a codec is untrained, unreadable or does not fit
    ├── IndexFileError          an index file cannot be used
    └── TierError               a tier failed
        ├── RecordError         a record of the home is damaged
        ├── TierClosedError     a tier was used after `close`
        └── TierReadOnlyError   a write to a tier that was opened for reading
"""


class M3Error(Exception):
    """Base class of all errors; its message is one line that names the thing at fault and what to do."""


class ConfigError(M3Error):
    """The configuration is wrong; the message names the origin (file, variable or option), the key and its values."""


class InputError(M3Error):
    """A text, file or argument cannot be used."""


class PromptTooLongError(InputError):
    """A prompt and its answer need more positions, or more room, than the model has."""


class PluginError(M3Error):
    """A plug-in is unknown, broken or not installed; the message names the extra that installs it."""


class BankError(M3Error):
    """The bank as a whole cannot be used."""


class BankMissingError(BankError):
    """The path holds no bank."""


class BankFormatError(BankError):
    """The bank was written in a format version that this release does not read."""


class BankMismatchError(BankError):
    """The bank was written by another model, tokenizer, spec, codec or embedder; the message names the difference."""


class BankBusyError(BankError):
    """The bank is already open for writing: one process may write it, any number may read it."""


class BankFullError(BankError):
    """The home has reached its configured limit, or the drive is full; nothing of the batch was written."""


class BlockError(M3Error):
    """Bytes are not the expected block: they are damaged, of another bank, or of another id."""


class ForkedError(M3Error):
    """A runtime is used in a process that was forked after it was opened; threads and locks are not copied."""


class StoreFullError(M3Error):
    """Leased memories fill the memory store, so a recall finds no room. See ``recall.decoded``."""


class EngineClosedError(M3Error):
    """A request is submitted to an engine that has been closed."""


class EncoderError(M3Error):
    """Processes that encode for a writer died again and again over the same references."""


class RemoteError(M3Error):
    """An engine at a URL cannot be reached, refuses us, or breaks off an answer; the message names the URL."""


class CodecError(M3Error):
    """A codec is untrained, unreadable, or does not fit the spec."""


class IndexFileError(M3Error):
    """An index file cannot be used; the index is a cache, and is rebuilt from the home."""


class TierError(M3Error):
    """A tier failed; a block that the tier does not hold is a miss and never raises this."""


class RecordError(TierError):
    """A record of the home is damaged: a reference, an embedding or metadata.

    ``id`` is the memory that the record belongs to, or None where no single memory does.
    """

    def __init__(self, message: str, id: int | None = None) -> None:
        super().__init__(message)
        self.id = id


class TierClosedError(TierError):
    """A tier was used after it was closed."""


class TierReadOnlyError(TierError):
    """A write to a tier that was opened for reading."""
