"""The shape of a model that is not loaded is that of the model that is."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from m3model.loading.sizing import shape_of
from m3model.transformers import TransformersAdapter
from m3runtime.config.schema import MemoryConfig, ModelConfig
from m3runtime.errors import ConfigError
from m3runtime.memory.shape import ModelShape, memory_spec
from tests.model.families import FAMILIES, make_model, make_tokenizer

CPU = torch.device("cpu")
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def configured(folder: Path, kind: str, **more: Any) -> ModelConfig:
    """A folder with nothing but ``config.json`` in it."""
    AutoConfig.for_model(kind, **{**SIZE, **more}).save_pretrained(folder)
    return ModelConfig(path=str(folder))


def check(shape: ModelShape, model: Any) -> None:
    """Hold a shape to the weights of a model."""
    layers = list(model.get_decoder().layers)
    assert shape.layers == len(layers)
    for layer in layers:
        matrices = sum(weights.numel() for weights in layer.parameters() if weights.ndim > 1)
        assert matrices == shape.attention_weights + shape.mlp_weights
    assert tuple(model.get_output_embeddings().weight.shape) == (shape.vocabulary, shape.hidden)


@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in ("gemma4_text", "gpt_oss-sliding")])
def test_every_family_without_its_weights(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    shape = TransformersAdapter.shape(ModelConfig(path=str(tmp_path)))
    check(shape, model)
    assert shape.gated
    assert shape.dtype == "float32"


def test_it_is_the_spec_of_the_adapter(tmp_path: Path) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    logging.disable_progress_bar()
    model.save_pretrained(tmp_path / "whole")
    logging.enable_progress_bar()
    tokenizer.save_pretrained(tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "whole/config.json", tmp_path / "bare")
    memory = MemoryConfig.model_validate({"preset": "memory3"})
    adapter = TransformersAdapter.open(ModelConfig(path=str(tmp_path / "whole")), memory, CPU)
    shape = shape_of(ModelConfig(path=str(tmp_path / "bare")))
    assert adapter.spec == memory_spec(
        memory, layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype="float32"
    )
    assert adapter.spec.layers == (0, 1)
    assert adapter.spec.tokens == 8


def test_an_mlp_without_a_gate(tmp_path: Path) -> None:
    model = configured(tmp_path, "starcoder2")
    shape = shape_of(model)
    assert not shape.gated
    check(shape, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)))


def test_what_weights_are_stored_in(tmp_path: Path) -> None:
    assert shape_of(configured(tmp_path, "llama", dtype=torch.bfloat16)).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("mixtral", {"num_local_experts": 4}, "are not all attention and one MLP; say what the shape is with --shape"),
        ("mamba", {}, "cannot read memories: layers of the kind linear_attention keep no keys"),
        ("bert", {}, "cannot tell the shape of a causal language model from|cannot read memories"),
        ("vit", {}, "cannot tell the shape of a causal language model from"),
    ],
)
def test_models_of_another_kind(tmp_path: Path, kind: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        shape_of(configured(tmp_path, kind, **more))
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^model.path: no such folder: {tmp_path}/none$"):
        shape_of(ModelConfig(path=f"{tmp_path}/none"))
    with pytest.raises(ConfigError, match=f"^model.path: cannot tell the shape of .* from {tmp_path}: "):
        shape_of(ModelConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"^model\.path: no such file: none\.gguf$"):
        shape_of(ModelConfig(path="none.gguf"))


@pytest.mark.real_model
def test_smollm2(smollm2_path: Path) -> None:
    shape = shape_of(ModelConfig(path=str(smollm2_path)))
    assert shape == ModelShape(30, 576, 9, 3, 64, 1536, 49_152, gated=True, dtype="float32")
