"""Contract suites for authors of backends: subclass one in your tests and say how to make your backend.

============================  =============================================================
module                        what it holds
============================  =============================================================
``caching``                   `CachingTierContract`: a bounded tier
``persistent``                `PersistentTierContract`: one whose blocks outlive the process
``slab``                      `SlabTierContract`: one that is a `SlabTier`
``home``                      `HomeContract`
``codec``                     `CodecContract`
``index``                     `IndexContract`
``embedder``                  `EmbedderContract`
``encoders``                  `EncoderPoolContract`: processes that encode for one that writes
``eviction``                  `EvictionContract`
``hierarchy``                 `HierarchyMachine`: tiers under a hierarchy, against a dict
``faulty``, ``slow``,         wrappers that fail on a schedule, take their time, or write
``recording``                 down what they are asked for
============================  =============================================================

The classes have no ``Test`` prefix, so pytest collects only their subclasses. They need pytest and hypothesis:
``pip install 'm3runtime[testing]'``. docs/write-a-tier.md shows how.
"""
