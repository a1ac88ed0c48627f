"""The Triton kernel against torch: on a GPU, and in Triton's interpreter, which `test_in_the_interpreter` starts."""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.product.transform import CENTROIDS, WIDTHS
from m3runtime.codecs.product.transform_design import TransformDesign
from m3runtime.codecs.product.transform_quantiser import TransformQuantiser, kernel_of
from m3runtime.errors import BlockError
from m3runtime.memory.spec import MemorySpec
from m3runtime.testing.codec import OUT, identical, noise

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when it is imported, so before any test
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TRITON = importlib.util.find_spec("triton") is not None
if TRITON:
    from m3runtime.codecs.product.kernels import by_triton, nearest_by_triton
    from m3runtime.codecs.product.kernels.by_triton import UNITS_TOLERANCE, Tile

needs_triton = pytest.mark.skipif(not TRITON, reason="needs Triton")
outside = pytest.mark.skipif(INTERPRETED, reason="not in the interpreter")


def on_device(test: Callable[..., None]) -> Callable[..., None]:
    """What is tested on a GPU and in the interpreter."""
    return needs_triton(test if INTERPRETED else pytest.mark.gpu(test))


def design_of(layers: int, kv_heads: int, head_dim: int, together: str, bytes: int = 6) -> TransformDesign:
    return TransformDesign(MemorySpec(tuple(range(layers)), kv_heads, 70, head_dim, 70, "float32"), bytes, together)


def quantiser(layers: int, kv_heads: int, head_dim: int, together: str, bytes: int = 6) -> TransformQuantiser:
    """On the CPU, of random numbers. Of a unit's coordinates, some are covered by no code, and one unit has none."""
    random = torch.Generator().manual_seed(head_dim)
    design = design_of(layers, kv_heads, head_dim, together, bytes)
    parts = []
    for unit in range(1, design.units.count):
        at = 0
        for i in range(max(1, design.token_bytes // design.units.count)):
            width = WIDTHS[(unit + i) % len(WIDTHS)]
            at += i == 1  # a gap
            if at + width <= design.units.channels:
                parts.append((width, unit, at))
            at += width
    parts.sort()
    kept = {unit: max(at + width for width, of, at in parts if of == unit) for _, unit, _ in parts}
    tensors = {
        "parts": torch.tensor([(unit, at, width) for width, unit, at in parts], dtype=torch.int32),
        "mean": torch.randn(design.units.count, design.units.channels, generator=random),
        "forward": torch.randn(sum(kept.values()), design.units.channels, generator=random),
        "inverse": torch.randn(sum(kept.values()), design.units.channels, generator=random),
    }
    for width in WIDTHS:
        count = sum(part[0] == width for part in parts)
        tensors[f"width{width}"] = torch.randn(count, CENTROIDS, width, generator=random)
    return design.restore(tensors)


@cache
def pair(*arguments: object) -> tuple[TransformQuantiser, TransformQuantiser]:
    """One that decodes by torch on the CPU, and one by the kernel on the device."""
    plain = quantiser(*arguments)  # type: ignore[arg-type]
    other = plain.to(DEVICE)
    if INTERPRETED:
        other.__dict__["_kernel"] = kernel_of(other.transform)  # which is for CUDA otherwise
    assert other._kernel is not None
    return plain, other


def codecs(*arguments: object) -> tuple[ProductCodec, ProductCodec]:
    """The same two as codecs."""
    made = []
    for each in pair(*arguments):
        design = design_of(*arguments)  # type: ignore[arg-type]
        codec = ProductCodec(design.spec, **design.options)
        codec.restore(each.to(torch.device("cpu")).tensors())
        assert codec._state is not None
        codec._state.on[each.transform.mean.device] = each
        made.append(codec)
    return made[0], made[1]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to rounding: within 1e-6 of the largest."""
    a, b = a.cpu(), b.cpu()
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-6 * a.abs().max())


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to what matrix units round, and the type."""
    type_rounds = torch.finfo(b.dtype).eps / 2
    a, b = a.cpu().float(), b.cpu().float()
    return bool((a - b).norm() <= (UNITS_TOLERANCE + type_rounds) * a.norm())


SHAPES = [(2, 1, 16, "layer"), (2, 3, 24, "layer"), (2, 1, 64, "layer"), (1, 2, 80, "head"), (2, 2, 16, "head")]


@on_device
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [1, 33])
def test_it_decodes_what_torch_decodes(shape: tuple[object, ...], width: int) -> None:
    plain, other = pair(*shape)
    payloads = noise(2, width * plain.token_bytes, seed=width)
    wanted, found = plain.decode(payloads, width), other.decode(payloads.to(DEVICE), width)
    for a, b in zip(wanted, found, strict=True):
        assert b.dtype == torch.float32
        assert b.is_contiguous()
        assert close(a, b)


@on_device
@pytest.mark.parametrize("together", ["layer", "head"])
def test_a_tile_of_many_coordinates(together: str) -> None:
    """More than are multiplied at a time, and more channels than one tile has."""
    plain, other = pair(2, 2, 40, together, 30)
    payloads = noise(1, 3 * plain.token_bytes, seed=0)
    for a, b in zip(plain.decode(payloads, 3), other.decode(payloads.to(DEVICE), 3), strict=True):
        assert close(a, b)


@on_device
@pytest.mark.parametrize("together", ["layer", "head"])
def test_matrix_units_are_within_their_tolerance(together: str) -> None:
    """Of tiles with many coordinates, and of units that are wider than a tile."""
    plain, other = pair(2, 4, 64, together, 30)
    payloads = noise(2, 70 * plain.token_bytes, seed=5)
    wanted, found = plain.decode(payloads, 70), other.decode(payloads.to(DEVICE), 70, torch.bfloat16)
    for a, b in zip(wanted, found, strict=True):
        assert b.dtype == torch.bfloat16
        assert near(a, b)
        assert not close(a, b.float())


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_decodes_alike_in_any_batch_and_width(dtype: torch.dtype) -> None:
    _, other = pair(2, 3, 24, "layer")
    payloads = noise(3, 64 * other.token_bytes, seed=1).to(DEVICE)
    together = other.decode(payloads, 64, dtype)
    for row, width in ((0, 64), (1, 1), (1, 33), (2, 32)):
        alone = other.decode(payloads[row : row + 1], width, dtype)
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[row, :, :width], b[0])


@on_device
def test_rows_and_bytes_lie_anywhere() -> None:
    _, other = pair(2, 1, 16, "layer")
    payloads = noise(3, 5 * other.token_bytes, seed=2).to(DEVICE)
    wanted = other.decode(payloads, 5)
    slots = noise(6, payloads.shape[1] + 20, seed=3).to(DEVICE)[::2]
    for start in (1, 3, 7):
        slots[:, start : start + payloads.shape[1]] = payloads
        assert all(map(torch.equal, wanted, other.decode(slots[:, start:], 5)))
    apart = payloads.t().contiguous().t()
    assert all(map(torch.equal, wanted, other.decode(apart, 5)))


@on_device
def test_nothing_decodes_to_nothing() -> None:
    _, other = pair(2, 1, 16, "layer")
    for n, width in ((0, 0), (0, 3), (2, 0)):
        keys, values = other.decode(torch.zeros(n, 3 * other.token_bytes, dtype=torch.uint8, device=DEVICE), width)
        assert keys.shape == values.shape == (n, 2, width, 16)


@on_device
def test_a_quantiser_without_codes_decodes_to_the_mean() -> None:
    whole = quantiser(2, 1, 16, "layer")
    tensors = {name: tensor if name == "mean" else tensor[:0] for name, tensor in whole.tensors().items()}
    other = design_of(2, 1, 16, "layer").restore(tensors).to(DEVICE)
    kernel = kernel_of(other.transform)
    assert kernel is not None
    keys, values = torch.full((2, 1, 2, 3, 16), torch.nan, device=DEVICE)
    kernel(torch.zeros(1, 0, dtype=torch.uint8, device=DEVICE), keys, values)
    for found, mean in ((keys, whole.transform.mean[:, :16]), (values, whole.transform.mean[:, 16:])):
        assert torch.equal(found.cpu(), mean[:, None].expand(2, 3, 16)[None])


@on_device
@pytest.mark.parametrize("dtype", OUT)
def test_the_codec_decodes_alike(dtype: torch.dtype) -> None:
    """To every type, with zeros beyond each memory's tokens."""
    plain, other = codecs(2, 1, 16, "layer")
    tokens = torch.tensor([5, 34, 1])
    payloads = noise(3, plain.payload_bytes(34), seed=4)
    wanted, found = plain.decode(payloads, tokens, dtype), other.decode(payloads.to(DEVICE), tokens, dtype)
    for a, b in ((wanted.keys, found.keys), (wanted.values, found.values)):
        assert b.dtype == dtype
        assert close(a, b) if dtype == torch.float32 else near(a, b)
        assert not b[0, :, :, 5:].any()
    again = other.decode(payloads.to(DEVICE), tokens, dtype)
    assert identical(found, again)
    with pytest.raises(BlockError):
        other.decode(payloads[:, :-1].to(DEVICE), tokens, dtype)


@on_device
@pytest.mark.parametrize("shape", [(2, 3, 24, "layer"), (2, 2, 16, "head")])
def test_a_batch_is_encoded_as_each_memory_alone(shape: tuple[object, ...]) -> None:
    """To rounding: where two centroids are as near as float32 can tell, either is right."""
    plain, other = pair(*shape)
    counts, units = (5, 1, 70), plain.transform.units
    random = torch.Generator().manual_seed(6)
    heads = (units.heads, sum(counts), units.spec.head_dim)
    keys, values = (torch.randn(heads, generator=random) for _ in range(2))
    found = torch.zeros(3, 70 * plain.token_bytes, dtype=torch.uint8, device=DEVICE)
    other.encode_all((keys.clone().to(DEVICE), values.clone().to(DEVICE)), counts, found)
    wanted = torch.zeros(3, 70 * plain.token_bytes, dtype=torch.uint8)
    plain.encode_all((keys.clone(), values.clone()), counts, wanted)
    assert (found.cpu() != wanted).float().mean() < 1e-3
    alone = torch.zeros(70 * plain.token_bytes, dtype=torch.uint8, device=DEVICE)
    other.encode_all((keys[:, 6:].to(DEVICE), values[:, 6:].to(DEVICE)), counts[2:], alone[None])
    assert torch.equal(found[2], alone)


# -- without a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.long
@needs_triton
@outside
def test_in_the_interpreter() -> None:
    """All of the above, in a process of its own: a Triton that interprets is of no use to anything else."""
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 passed" in done.stdout


@outside
def test_torch_decodes_on_a_cpu() -> None:
    assert quantiser(2, 1, 16, "layer")._kernel is None


@needs_triton
@outside
def test_a_triton_that_fails_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """As it does on a CPU, for want of a driver or because the numbers are out of the GPU's reach."""
    with caplog.at_level(logging.WARNING, "m3runtime"):
        assert kernel_of(quantiser(2, 1, 16, "layer").transform) is None
    assert "Triton failed, so torch decodes memories, more slowly: " in caplog.text


@outside
def test_a_triton_that_is_missing_is_not(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernel_of(quantiser(2, 1, 16, "layer").transform) is None
    assert not caplog.text


def compiled(
    kernel: Any, kinds: dict[str, str], constants: dict[str, Any], capability: int = 90, warps: int = 4
) -> str:
    """A kernel in the language of a GPU that is not here."""
    import triton
    from triton.backends.compiler import GPUTarget

    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"enable_fp_fusion": True, "num_warps": warps}
    return str(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"])


def ptx(capability: int, kind: str, tile: Tile) -> str:
    """The kernel that decodes, with numbers of this kind."""
    kinds = {"payloads": "*u8", "row_bytes": "i32", "width": "i32", "keys": kind, "values": kind, "mean": "*fp32"}
    kinds |= dict.fromkeys(("bounds", "positions", "sizes", "starts", "target"), "*i32")
    kinds |= dict.fromkeys(("table", "inverse"), kind)
    constants = {"TOKEN_BYTES": 123, "HEADS": 90, "HEAD_DIM": 64, "CHANNELS": 384}
    constants |= {"TILE_TOKENS": tile.tokens, "TILE_CHANNELS": tile.channels, "STEP": tile.coordinates, "WIDENS": False}
    return compiled(by_triton.decode_tile, kinds, constants, capability, tile.warps)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is compiled anew."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@needs_triton
@outside
@pytest.mark.usefixtures("own_cache")
def test_it_compiles_to_sums_of_float32() -> None:
    """Matrix units would round to TF32."""
    made = ptx(90, "*fp32", by_triton._PLAIN)
    assert "fma.rn.f32" in made
    assert "mma" not in made


@needs_triton
@outside
@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("capability", "units"), [(80, "mma.sync"), (90, "wgmma")])
def test_it_compiles_to_matrix_units(capability: int, units: str) -> None:
    """Their sums are of float32."""
    made = ptx(capability, "*bf16", by_triton._WIDE_UNITS)
    found = [line for line in made.splitlines() if units in line and "bf16" in line]
    assert found
    assert all(".f32.bf16.bf16" in line for line in found)


@needs_triton
@outside
@pytest.mark.usefixtures("own_cache")
def test_the_search_of_centroids_compiles() -> None:
    """And keeps its scores in registers: it stores codes alone."""
    kinds = {"x": "*fp32", "places": "*i64", "against": "*fp32", "out": "*u8"}
    kinds |= dict.fromkeys(("row_step", "token_step", "tokens", "out_step"), "i32")
    made = compiled(nearest_by_triton.nearest_tile, kinds, {"SIZE": 8, "CENTROIDS": CENTROIDS, "TILE": 32})
    assert "fma.rn.f32" in made
    stored = [line for line in made.splitlines() if "st.global" in line]
    assert stored
    assert all(".b8" in line for line in stored)
