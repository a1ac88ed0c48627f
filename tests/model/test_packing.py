"""Linear layers with packed weights: the library's products wherever those are asked for, and never an old weight's."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m3model.adapter import TransformersAdapter
from m3model.engine.packing import pack, unpacked
from m3runtime.config.schema import ModelConfig
from m3runtime.device.packed import PackedWeight
from tests.model.families import make_adapter, make_model
from tests.model.test_decode_step import Operations


class Layers(nn.Module):
    """Two layers of which one may be packed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.other = nn.Bilinear(3, 3, 2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.first(rows)  # type: ignore[no-any-return]


@pytest.fixture
def layers() -> Any:
    torch.manual_seed(0)
    model = Layers()
    pack(model)
    assert "forward" in vars(model.first)
    assert "forward" not in vars(model.other)
    return model


def product(model: Any, rows: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(rows)  # type: ignore[no-any-return]


def expected(model: Any, rows: Tensor) -> Tensor:
    weight = PackedWeight.of(model.first.weight)
    assert weight is not None
    with torch.inference_mode():
        return weight.product(rows, model.first.bias)


ROWS = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def test_packing_twice_is_packing_once(layers: Any) -> None:
    forward = layers.first.forward
    pack(layers)
    assert layers.first.forward is forward
    assert torch.equal(product(layers, ROWS), expected(layers, ROWS))


def uses_packed(model: Any) -> bool:
    with torch.inference_mode(), Operations() as seen:
        model(ROWS)
    return "mkldnn::_linear_pointwise" in seen.names


def test_the_librarys_own_products_are_back_in_the_block_and_with_gradients(layers: Any) -> None:
    own = nn.Linear.forward(layers.first, ROWS)
    assert uses_packed(layers)
    with unpacked(layers):
        assert not uses_packed(layers)
        assert torch.equal(product(layers, ROWS), own)
    assert uses_packed(layers)
    with pytest.raises(ValueError, match="mine"), unpacked(layers):
        raise ValueError("mine")
    assert uses_packed(layers)
    learning = layers(ROWS)
    assert torch.equal(learning, own)
    learning.sum().backward()
    assert layers.first.weight.grad is not None


@pytest.mark.parametrize("how", ["in place", "other data", "another parameter", "loaded"])
def test_a_changed_weight_is_packed_anew(layers: Any, how: str) -> None:
    before = product(layers, ROWS)
    new = layers.first.weight.detach() * 2
    with torch.no_grad():
        if how == "in place":
            layers.first.weight.mul_(2)
        elif how == "other data":
            layers.first.weight.data = new
        elif how == "another parameter":
            layers.first.weight = nn.Parameter(new)
        else:
            layers.load_state_dict({**layers.state_dict(), "first.weight": new})
    after = product(layers, ROWS)
    assert not torch.equal(after, before)
    assert torch.equal(after, expected(layers, ROWS))


@pytest.mark.parametrize("how", ["copied", "saved"])
def test_a_copy_has_weights_of_its_own(layers: Any, how: str) -> None:
    before = product(layers, ROWS)
    if how == "copied":
        other = copy.deepcopy(layers)
    else:
        file = io.BytesIO()
        torch.save(layers, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(product(other, ROWS), before)
    with torch.no_grad():
        other.first.weight.zero_()
    assert torch.equal(product(other, ROWS), other.first.bias.expand(5, -1))
    assert torch.equal(product(layers, ROWS), before)


def test_rows_of_another_dtype_or_of_one_dimension_are_the_layers_own(layers: Any) -> None:
    assert torch.equal(product(layers, ROWS[0]), nn.Linear.forward(layers.first, ROWS[0]))
    with pytest.raises(RuntimeError, match="dtype"):
        product(layers, ROWS.double())


def test_a_model_is_packed_by_its_adapter_unless_it_says_no() -> None:
    assert ModelConfig.model_fields["pack"].default is True

    def packed(adapter: Any) -> list[str]:
        return [name for name, layer in adapter.model.named_modules() if "forward" in vars(layer)]

    adapter = make_adapter("llama")
    assert packed(adapter) == [name for name, layer in adapter.model.named_modules() if type(layer) is nn.Linear]
    model = copy.deepcopy(make_model("llama"))
    plain = TransformersAdapter(model, adapter.tokenizer, adapter.memory, "llama", pack=False)
    assert packed(plain.with_memory(adapter.memory)) == packed(plain) == []
    other = make_adapter("llama")
    assert packed(other.with_memory(other.memory)) == packed(other)
