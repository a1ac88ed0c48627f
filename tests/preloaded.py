"""Imports all that programs of the tests need. `tests.forked` forks them from a process that has done that once.

It has opened nothing, and computed nothing: threads do not survive a fork.
"""

import gc
from importlib import import_module

import faiss  # before usearch, see tests/conftest.py
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401 - found on first use

MODULES = [
    "encodings.utf_8_sig",
    "html",
    "lmdb._envid",
    "m3backends.lmdb.home",
    "m3backends.slabs",
    "m3backends.usearch.index",
    "m3model.attention.passes",
    "m3model.memory3",
    "m3model.training.run",
    "m3model.transformers",
    "m3runtime.cli",
    "m3runtime.codecs.product.codec",
    "m3runtime.codecs.product.kernels.sharing",
    "m3runtime.codecs.product.kmeans",
    "m3runtime.config.loading",
    "m3runtime.documents.tags",
    "m3runtime.serve.changes",
    "m3runtime.testing.home",
    "m3runtime.testing.process",
    "m3runtime.writing.forgetting",
    "m3runtime.writing.mirror",
    "m3runtime.writing.writer",
    "rich.progress",
    "tests.end_to_end.embedders",
    "transformers.modeling_gguf_pytorch_utils",
    "usearch.index",
]

for name in MODULES:
    import_module(name)
torch.set_num_threads(1)
faiss.omp_set_num_threads(1)
gc.freeze()  # or each child would look for garbage in all of it, and copy its pages
