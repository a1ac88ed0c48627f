"""`HomeCopy`: a home that a bench fills, closes, and reads cold."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from m3runtime import assembly
from m3runtime.config.schema import Config, TierConfig
from m3runtime.memory.block import Ids
from m3runtime.storage.home import Home


class HomeCopy:
    """A home of one kind: ``home`` is filled once, and ``written`` is another one that is written all the time."""

    def __init__(self, name: str, folder: Path, config: Config, tier: TierConfig, slot_bytes: int) -> None:
        """A home in an object store lies at its ``url`` and a random name. Raises what making a home raises."""
        self.name = name
        self.in_folder = "url" not in tier.options
        self._folder = folder
        self._config, self._tier, self._slot_bytes = config, tier, slot_bytes
        self._suffix = secrets.token_hex(8)
        self.home, self.written = self._open("home"), self._open("written")

    def close(self) -> None:
        """Close both homes. In an object store they are emptied before."""
        for home in (self.home, self.written):
            if not self.in_folder:
                home.discard(home.ids())
                home.compact()
            home.close()

    def cool(self) -> None:
        """Open the home anew, and drop its files from the page cache: pages that are mapped would stay there."""
        self.home.close()
        self.home = self._open("home")
        drop(self._folder / "home")

    def cool_in_use(self, others: Ids, out: Tensor) -> None:
        """The same for a home that has read other blocks since."""
        self.cool()
        self.home.read(others, out)
        drop(self._folder / "home")

    def _open(self, name: str) -> Home:
        options = dict(self._tier.options)
        if not self.in_folder:
            options["url"] = f"{str(options['url']).rstrip('/')}-{self._suffix}-{name}"
        tier = TierConfig.model_validate({"kind": self._tier.kind, **options})
        opened = assembly.open_home(self._config.model_copy(update={"tiers": (tier,)}))
        return opened(path=self._folder / name, slot_bytes=self._slot_bytes)


def drop(folder: Path) -> None:
    """Drop the files below a folder from the page cache, but for pages that are mapped."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
            with suppress(OSError):
                os.fsync(file)  # what is not on the drive stays
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
