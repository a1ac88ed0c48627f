"""GGUF files are converted once, into a cache of the user."""

import logging
import os
import shutil
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel

from m3model.loading import gguf
from m3model.loading.fingerprint import ModelIdentity, tokenizer_fingerprint
from m3model.loading.models import load
from m3model.loading.sizing import shape_of
from m3runtime.config.schema import ModelConfig
from m3runtime.errors import ConfigError

CPU = torch.device("cpu")
LAYERS, HIDDEN, HEADS, MLP = 2, 32, 4, 48


def write_gguf(path: Path, seed: int = 0) -> Path:
    """A Llama of two layers with random weights, whose tokens are bytes."""
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "th"]
    file = GGUFWriter(path, "llama")
    file.add_block_count(LAYERS)
    file.add_context_length(256)
    file.add_embedding_length(HIDDEN)
    file.add_feed_forward_length(MLP)
    file.add_head_count(HEADS)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_dimension_count(HIDDEN // HEADS)
    file.add_rope_freq_base(10_000.0)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list(tokens)
    file.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    file.add_token_merges(["t h"])
    file.add_bos_token_id(0)
    file.add_eos_token_id(1)
    draw = np.random.default_rng(seed)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (HIDDEN // 2, HIDDEN),
            f"blk.{layer}.attn_v": (HIDDEN // 2, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (MLP, HIDDEN),
            f"blk.{layer}.ffn_up": (MLP, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, MLP),
        }
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", draw.normal(0, 0.2, shape).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "m3runtime" / "models"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def conversions(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()] if cache.exists() else []


def direct(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The fingerprints of a file that no cache keeps."""
    with monkeypatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", os.devnull)
        return fingerprints(file)


def fingerprints(file: Path) -> tuple[str, str]:
    model, tokenizer = load(str(file), "auto", CPU)
    return ModelIdentity.of(model).fingerprint, tokenizer_fingerprint(tokenizer)


def test_a_file_is_converted_once(
    file: Path,
    cache: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = direct(file, monkeypatch)
    assert [record.getMessage() for record in caplog.records] == [
        f"{file} is converted at every start: {os.devnull}/m3runtime/models: Not a directory"
    ]
    caplog.clear()
    assert fingerprints(file) == expected
    [made] = conversions(cache)
    assert [record.getMessage() for record in caplog.records] == [f"converting {file}, once, into {made}"]
    caplog.clear()
    weights = (made / "model.safetensors").stat()
    assert fingerprints(file) == expected
    assert (made / "model.safetensors").stat() == weights
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")  # no bar
    assert shape_of(ModelConfig(path=str(file))).layers == LAYERS


def test_a_file_that_changed_is_converted_anew(file: Path, cache: Path) -> None:
    before = fingerprints(file)
    [old] = conversions(cache)
    write_gguf(file, seed=1)
    assert fingerprints(file)[0] != before[0]
    [new] = conversions(cache)
    assert new != old


def test_files_of_one_name_are_told_apart(file: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = write_gguf(tmp_path / "other/tiny.gguf", seed=1)
    assert fingerprints(file) != fingerprints(other)
    assert len(conversions(cache)) == 2
    assert load(str(file), "bfloat16", CPU)[0].dtype == torch.bfloat16


def test_an_interrupted_conversion_leaves_nothing(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: object, tokenizer: object, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gguf, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(str(file), "auto", CPU)
    assert conversions(cache) == []
    fingerprints(file)
    assert len(conversions(cache)) == 1


def test_a_file_that_is_no_model_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    with pytest.raises(ConfigError, match=r"^model\.path: cannot load a causal language model from "):
        load(str(bad), "auto", CPU)
    assert conversions(cache) == []


def test_a_full_drive_is_no_obstacle(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = shutil.disk_usage(file.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    fingerprints(file)
    assert conversions(cache) == []
    assert "has no room for" in caplog.text


@pytest.mark.slow
def test_processes_that_start_together_convert_once(file: Path, cache: Path) -> None:
    with get_context("spawn").Pool(3) as pool:
        found = pool.map(fingerprints, [file] * 3)
    assert len(set(found)) == len(conversions(cache)) == 1


def test_messages_go_to_the_log_of_the_project() -> None:
    assert gguf.log is logging.getLogger("m3runtime")
