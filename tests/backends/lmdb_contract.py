"""`HomeContract` for homes in LMDB: the back door is a transaction of LMDB's own."""

from m3backends.lmdb.compression import unpack
from m3backends.lmdb.home import LmdbHome
from m3runtime.storage.tier import Tier
from m3runtime.testing.home import HomeContract


class LmdbContract(HomeContract):
    def raw_read(self, tier: Tier, id: int) -> bytes | None:
        assert isinstance(tier, LmdbHome)
        with tier._environment.env.begin(db=tier._db.blocks) as txn:
            stored = txn.get(id.to_bytes(8, "big"))
            return None if stored is None else bytes(unpack(memoryview(stored), tier.slot_bytes, tier._dictionary))

    def raw_write(self, tier: Tier, id: int, block: bytes) -> None:
        assert isinstance(tier, LmdbHome)
        with tier._environment.env.begin(write=True, db=tier._db.blocks) as txn:
            txn.put(id.to_bytes(8, "big"), block)
