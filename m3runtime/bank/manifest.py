"""`Manifest`: the record that says which model, tokenizer, codec and embedder a bank belongs to."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from m3runtime.errors import (
    BankError,
    BankFormatError,
    BankMismatchError,
    BankMissingError,
    ConfigError,
    RecordError,
)
from m3runtime.memory.block import BlockStamp
from m3runtime.memory.spec import MemorySpec, canonical_json, fingerprint
from m3runtime.plugins.messages import difference, first_fault, one_line
from m3runtime.storage.home import Home

FORMAT = 1
"""The bank's format. How a home arranges its records is its own schema: see the home."""
SEVERAL = 2
"""The format of a bank that has, or will have, blocks of several codecs. Its blocks are those of format 1."""
HEADED = 3
"""The format of a bank whose texts the model has read below their headings. It has all that `SEVERAL` has."""
SHAPED = 4
"""The format of a bank whose spec has `MemorySpec.heads`. It has all that `HEADED` has."""
UNEVEN = 5
"""The format of a bank whose spec has `MemorySpec.budgets`. It has all that `SHAPED` has."""
_KEY = "manifest"
Fingerprint = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
_RESTORE = "restore the bank from a copy, or write it anew"
_MEND = "configure it as it was, or set `bank` to another folder"


@dataclass(frozen=True, slots=True)
class PlannedCodec:
    """A codec that is trained once the bank has enough memories to train it on."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    kind: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class OtherCodec:
    """A codec that some blocks of a bank may have, and that is not the newest."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    kind: str
    options: Mapping[str, Any]
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that a bank was made with. Banks with equal manifests hold interchangeable blocks."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    model: str
    """Fingerprint of the model."""
    model_name: str
    tokenizer: str
    """Fingerprint of the tokenizer."""
    sink: str
    spec: MemorySpec
    codec_kind: str
    """The kind of the newest codec, which encodes new blocks."""
    codec_options: Mapping[str, Any]
    codec: Fingerprint
    """Fingerprint of the newest codec."""
    embedder: str
    """Fingerprint of the embedder."""
    embedder_name: str
    dim: Annotated[int, Field(ge=1, le=1 << 20)]
    """Length of an embedding."""
    model_settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The settings that the model's fingerprint covers; banks of earlier releases have none."""
    others: tuple[OtherCodec, ...] = ()
    """The other codecs that blocks may have. The first one, if any, encodes what the newest would spoil."""
    planned: PlannedCodec | None = None
    """The codec to train when there is enough to train on; None if the bank has its codec."""
    typical_errors: tuple[float, ...] = ()
    """`m3runtime.bank.codecs.Spoiling.typical` of the newest codec; empty if its blocks are not compared with it."""
    headings: bool = False
    """Does the model read each text below its headings? Not in banks that an earlier release began."""

    @property
    def format(self) -> int:
        """`FORMAT`, or that of a bank which earlier releases must not touch."""
        if self.spec.budgets:
            return UNEVEN
        if self.spec.heads:
            return SHAPED
        if self.headings:
            return HEADED
        return SEVERAL if self.others or self.planned or self.typical_errors else FORMAT

    @property
    def stamp(self) -> BlockStamp:
        """The stamp of new blocks: see `stamp_of`."""
        return self.stamp_of(self.codec_kind, self.codec)

    @property
    def stamps(self) -> tuple[BlockStamp, ...]:
        """The stamps of all codecs, the newest first."""
        return (self.stamp, *(self.stamp_of(one.kind, one.fingerprint) for one in self.others))

    def stamp_of(self, kind: str, codec: str) -> BlockStamp:
        """The fingerprints in every block of a codec: over all that a block's meaning depends on, and nothing else."""
        of = [FORMAT, self.model, self.tokenizer, self.sink, self.spec.to_json(), kind, codec]
        of += ["headings"] if self.headings else []
        return BlockStamp(bank=fingerprint(of), codec=codec)

    def with_codec(self, kind: str, options: Mapping[str, Any], codec: str, **changes: Any) -> "Manifest":
        """This manifest with another newest codec, and the one before as the first of the others.

        ``changes`` are those of other fields.
        """
        former = OtherCodec(self.codec_kind, self.codec_options, self.codec)
        known = {one.fingerprint: one for one in (former, *self.others)}
        known.pop(codec, None)
        of_codec = {"codec_kind": kind, "codec_options": dict(options), "codec": codec}
        return replace(self, **{"others": tuple(known.values()), **of_codec, **changes})

    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of model, tokenizer, embedder, codec and bank, as text for people."""

        def short(name: str) -> str:  # a hub name whole, and of a folder what tells it from others
            return "/".join(Path(name).parts[-2:])

        return {
            "model": f"{short(self.model_name)} ({self.model})",
            "tokenizer": self.tokenizer,
            "embedder": f"{short(self.embedder_name)} ({self.embedder})",
            "codec": f"{self.codec_kind} ({self.codec})",
            **{f"another codec, {n}": f"{one.kind} ({one.fingerprint})" for n, one in enumerate(self.others, 1)},
            "bank": self.stamp.bank,
        }

    def to_bytes(self) -> bytes:
        """Canonical JSON. Fields that only later formats have are left out of earlier ones."""
        fields = {**asdict(self), "spec": self.spec.to_json(), "format": self.format}
        later = [name for format, names in _SINCE.items() if format > self.format for name in names]
        fields = {name: value for name, value in fields.items() if name not in later}
        return canonical_json(fields).encode()

    @classmethod
    def from_bytes(cls, value: bytes, where: Path) -> "Manifest":
        """The manifest that `to_bytes` wrote. Raises `BankFormatError` for another format, `BankError` for damage."""
        try:
            stated = from_json(value)
            if (version := stated["format"]) not in (FORMAT, *_SINCE):
                mend = "install a newer m3runtime" if version > UNEVEN else "write the bank anew"
                raise BankFormatError(
                    f"{where}: bank of format {one_line(version)}, this release reads {FORMAT} to {UNEVEN}; {mend}"
                )
            fields = {name: value for name, value in stated.items() if name != "format"}
            manifest = _MANIFEST.validate_json(to_json(fields))
            if manifest.format != version or type(version) is not int:
                raise ValueError(f"it states format {one_line(version)}, and its fields are of {manifest.format}")
            return manifest
        except (ValueError, KeyError, TypeError, ConfigError) as error:
            fault = first_fault(error) if isinstance(error, ValidationError) else error
            raise BankError(f"{where}: the manifest cannot be read: {one_line(fault)}; {_RESTORE}") from error

    @classmethod
    def read(cls, path: Path, home: Home) -> "Manifest":
        """The manifest in the home of the bank at ``path``.

        Raises `BankMissingError` if there is none, `BankFormatError`, and `BankError` if it is damaged.
        """
        value = cls._stored(path, home)
        if value is None:
            raise BankMissingError(f"the bank at {path} was never finished; run `m3 write` again")
        return cls.from_bytes(value, path)

    @classmethod
    def is_in(cls, path: Path, home: Home) -> bool:
        """Does the home of the bank at ``path`` have a manifest? Raises `BankError` if its record is damaged."""
        return cls._stored(path, home) is not None

    def write(self, home: Home) -> None:
        """Store the manifest in a home."""
        home.set_meta(_KEY, self.to_bytes())

    @staticmethod
    def _stored(path: Path, home: Home) -> bytes | None:
        try:
            return home.get_meta(_KEY)
        except RecordError as error:
            raise BankError(f"{path}: the manifest cannot be read: {error}; {_RESTORE}") from error

    def check_model(self, *, model: str, name: str, tokenizer: str, sink: str, spec: MemorySpec, where: Path) -> None:
        """Raise `BankMismatchError` that names the difference, unless this model wrote the bank."""
        if self.model != model:
            raise BankMismatchError(
                f"{where}: the bank was written by another model ({self.model_name}, {self.model[:8]}), "
                f"not {name} ({model[:8]}); {_MEND}"
            )
        if self.tokenizer != tokenizer:
            raise BankMismatchError(f"{where}: the bank was written with another tokenizer; {_MEND}")
        if self.sink != sink:
            raise BankMismatchError(f"{where}: the bank was written with the sink {self.sink!r}, not {sink!r}; {_MEND}")
        # An earlier release stored the zeros of heads that a layer does not have.
        if differing := self.spec.difference(spec if self.spec.heads else replace(spec, heads=())):
            raise BankMismatchError(f"{where}: the bank was written with another spec: {differing}; {_MEND}")

    def check_codec(self, *, kind: str, options: Mapping[str, Any], where: Path) -> None:
        """Raise `BankMismatchError` that names the differing options, unless the codec is, or is planned, of these."""
        of = self.planned or PlannedCodec(self.codec_kind, self.codec_options)
        if differing := difference({"kind": of.kind, **of.options}, {"kind": kind, **options}):
            raise BankMismatchError(
                f"{where}: the bank was written with another codec: {differing}; "
                "set `codec` as it was, or encode the bank anew with `m3 codec refit`"
            )

    def check_embedder(self, *, embedder: str, name: str, where: Path) -> None:
        """Raise `BankMismatchError` unless this embedder computed the bank's embeddings."""
        if self.embedder != embedder:
            raise BankMismatchError(
                f"{where}: the bank was written with another embedder ({self.embedder_name}), not {name}; {_MEND}"
            )


_MANIFEST = TypeAdapter(Manifest)
_SINCE = {SEVERAL: ("others", "planned", "typical_errors"), HEADED: ("headings",), SHAPED: (), UNEVEN: ()}
"""The fields that each format added."""
