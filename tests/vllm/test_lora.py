"""LoRA: a request by an adapter cannot read memories, which were computed without it, and is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from m3runtime.config.schema import Config
from tests.vllm.both import Ask, Both

pytestmark = pytest.mark.vllm

RANK = 8


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    return {"enable_lora": True, "max_lora_rank": RANK, "slots": 253}


@pytest.fixture(scope="module")
def lora(config: Config, tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    """One that turns queries about."""
    model = json.loads((Path(config.model.path) / "config.json").read_text())
    size = model["hidden_size"]
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    weights = {}
    for layer in range(model["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights |= {f"{name}.lora_A.weight": torch.randn(RANK, size), f"{name}.lora_B.weight": torch.randn(size, RANK)}
    save_file(weights, folder / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    return LoRARequest("turned", 1, str(folder))


def test_a_request_by_lora_reads_no_memories(both: Both, lora: LoRARequest, caplog: pytest.LogCaptureFixture) -> None:
    ask = Ask(both.prompt("What does the harbour lamp burn?"), 8, ((3,),))
    [alone] = both.theirs([ask])
    by_lora = both.submit(both.ids(ask), 8, {"m3": ask.wish}, lora=lora)
    plain = both.submit(both.ids(ask), 8, {"m3": ask.wish})
    refused, fine = both.wait([by_lora, plain])
    assert refused.error
    assert "LoRA: memories were computed by the model without it" in caplog.text
    assert not fine.error
    assert fine.tokens == alone.tokens


def test_lora_without_memories_is_lora(both: Both, lora: LoRARequest) -> None:
    ids = both.ids(Ask(both.prompt("What does the harbour lamp burn?")))[len(both.head) :]
    # One after the other: on a CPU vLLM 0.32 applies an adapter to all requests of a step.
    [without] = both.wait([both.submit(ids, 8, None)])
    [with_it] = both.wait([both.submit(ids, 8, None, lora=lora)])
    assert not with_it.error
    assert with_it.tokens != without.tokens
