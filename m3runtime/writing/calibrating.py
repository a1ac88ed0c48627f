"""`calibrate_bias`: fits bias directions to the queries of a bank's model, and stores them in the bank's folder."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from m3runtime import assembly
from m3runtime.adapters.bias import BiasCalibrating
from m3runtime.bank.bias import BIAS, BiasDirections
from m3runtime.config.schema import Config
from m3runtime.documents.reading import read_documents
from m3runtime.documents.splitting import Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.errors import ConfigError, InputError
from m3runtime.storage.files import remove_remains
from m3runtime.writing.codec_training import encoded
from m3runtime.writing.encoding import read_texts
from m3runtime.writing.fitting import sample

LENGTH = 8192
"""Tokens of a context by default, or fewer if the model has not as many positions."""


@dataclass(frozen=True, slots=True)
class BiasReport:
    """The result of `calibrate_bias`."""

    directions: BiasDirections
    path: Path | None
    """The file that was written; None for a dry run."""


def calibrate_bias(
    config: Config,
    *,
    length: int | None = None,
    texts: Sequence[Path] = (),
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> BiasReport:
    """Fit and measure bias directions over contexts of ``length`` tokens, and store them unless it is a dry run.

    The model reads the bank's references, or those of the files ``texts``. Nothing else in the bank changes, and others
    may read and write it meanwhile. Raises `InputError` if there is too little to read, or no room for so many tokens,
    `ConfigError` if the adapter cannot do it or the directions are not good enough, and `BankError`.
    """
    with closing(assembly.open_bank(config, read_only=True)) as bank, closing(assembly.open_adapter(config)) as adapter:
        manifest = bank.manifest
        adapter.check(manifest, bank.path)
        if not isinstance(adapter, BiasCalibrating):
            raise ConfigError(f"model.adapter: {type(adapter).__name__} cannot look at its model's queries")
        most = adapter.most_positions
        wanted = length or (LENGTH if most is None else min(LENGTH, most))
        if texts:
            splitter = Splitter(adapter.count_tokens, max_tokens=adapter.spec.reference_tokens)
            documents = read_documents(texts, fields=config.documents)
            with closing(ReferenceSpool(documents, splitter)) as references:
                chosen = sample(references, 2 * wanted, adapter.spec)
        else:
            chosen = sample(encoded(bank), 2 * wanted, adapter.spec)
        if len(chosen) < 2:
            raise InputError(
                f"too few references ({len(chosen)}): bias directions are fitted to some and measured on others; "
                "give more text by --text"
            )
        steps = partial(progress or (lambda *_: None), "Reading text for bias directions")
        found = adapter.calibrate_bias(read_texts(bank.manifest, adapter, chosen), wanted, steps)
    found = replace(found, facts=replace(found.facts, model=manifest.model, model_name=manifest.model_name))
    if dry_run:
        return BiasReport(found, None)
    remove_remains(config.bank / BIAS)
    return BiasReport(found, found.save(config.bank))
