"""The file ``table.json``, by which a folder names the table of its home in an object store."""

import json
from pathlib import Path

from m3backends.lance.table import LanceTable
from m3runtime.errors import BankError, BankMismatchError, BankMissingError
from m3runtime.storage.files import sync_folder, write_atomically

_FILE = "table.json"


def named_table(folder: Path, url: str, *, make: bool) -> str:
    """The table of the home in a folder. Without the file there is no home, unless one may be made.

    Raises `BankMismatchError` if the folder names another table, and `BankMissingError`.
    """
    if "://" not in url:
        raise BankError(f"tiers: url {url!r} is not one such as s3://bucket/bank")
    file = folder / _FILE
    try:
        named = json.loads(file.read_text())["url"]
    except FileNotFoundError:
        if not make:
            raise BankMissingError(f"there is no bank at {folder}") from None
        return url
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BankError(f"{file} is damaged: {error}; restore it, or write the url of the table into it") from error
    if named != url:
        raise BankMismatchError(f"{file} names the table {named}, not {url}; set `url` of the lance tier to that")
    return url


def name_table(folder: Path, url: str, table: LanceTable) -> None:
    """Write the file of a home that was made. Raises `BankError` if the table is another bank's.

    A bank's folder has its codec and more, so a table that is in use is not joined by an empty folder.
    """
    if (folder / _FILE).exists():
        return
    if not table.read(lambda snapshot: snapshot.is_empty):
        raise BankError(f"{url} is the table of another bank; copy the folder of that bank to {folder.parent}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / _FILE, json.dumps({"url": url}).encode())
        sync_folder(folder.parent)
    except OSError as error:
        raise BankError(f"bank {folder}: {error}") from error
