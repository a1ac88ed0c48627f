"""`store_cost`: the requests that a bank in an object store takes, and their price.

The numbers of requests were counted at the home `lance` in a store that speaks S3. They are rounded, and the price is
that of the requests and the room alone: traffic out of a cloud is not in it.
"""

from dataclasses import dataclass

from m3runtime.writing.encoding import GROUP

_PUTS_OF_A_COMMIT = 16
"""Requests that write or list, which cost the same: 7 that write a commit and reserve its ids, and 9 that list."""
_GETS_OF_A_FRAGMENT = 10
"""Requests by which a commit looks for its texts in one fragment of the table that has no index yet."""
_UNINDEXED, _SHARE = 20_000, 16
"""References, and one in how many, after which the table's indexes are brought up to date. A commit is a fragment."""
_GETS_OF_A_BLOCK = 2


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of a store in dollars. The defaults are list prices of Amazon S3 Standard in us-east-1."""

    put: float = 0.005
    """Of 1,000 requests that write or list."""
    get: float = 0.0004
    """Of 1,000 requests that read."""
    month: float = 0.023
    """Of a gigabyte (1e9 bytes) for a month."""


@dataclass(frozen=True, slots=True)
class StoreCost:
    """Requests to an object store, and their price in dollars."""

    puts: int
    """Requests that write or list, to write the whole bank in transactions of one group each."""
    gets: int
    """Requests that read, to write the whole bank, if it is never compacted in between."""
    write: float
    """The price of writing the whole bank."""
    gets_of_a_recall: int
    """Requests that read, for the memories of one chunk, if no tier above the store holds any."""
    recalls: float
    """The price of a million such recalls."""
    month: float
    """The price of the bank's room for a month."""


def store_cost(prices: Prices, *, references: int, stored: int, memories: int) -> StoreCost:
    """The cost of a bank of so many references and ``stored`` bytes, of which a chunk reads ``memories``."""
    commits = -(-references // GROUP)
    puts = commits * _PUTS_OF_A_COMMIT
    most = max(min(commits, _UNINDEXED // GROUP), commits // (2 * _SHARE))  # the bank grows: half of it on average
    gets = commits * _GETS_OF_A_FRAGMENT * most // 2
    of_a_recall = memories * _GETS_OF_A_BLOCK
    return StoreCost(
        puts=puts,
        gets=gets,
        write=(puts * prices.put + gets * prices.get) / 1000,
        gets_of_a_recall=of_a_recall,
        recalls=of_a_recall * prices.get * 1000,
        month=stored / 1e9 * prices.month,
    )
