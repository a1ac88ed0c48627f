"""A codec's file that is not what it should be: refused by name, without being read where it lies about its size."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from m3runtime.bank.codecs import CODEC
from m3runtime.codecs import files
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.product.transform_design import TransformDesign
from m3runtime.memory.spec import MemorySpec
from m3runtime.testing.codec import make_memories
from tests.end_to_end.commands import Place
from tests.hostile.banks import SPEC
from tests.hostile.cases import Case, check
from tests.hostile.nursery import Nursery

pytestmark = pytest.mark.long

REFUSED = f"^refused: Bank(Mismatch)?Error: .*/{CODEC}: "
Tensors = dict[str, Tensor]
Record = dict[str, Any]


def file_of(place: Place) -> Path:
    return place.bank / CODEC


def change(place: Place, work: Callable[[bytes], bytes]) -> None:
    file = file_of(place)
    file.write_bytes(work(file.read_bytes()))


def changed(work: Callable[[bytes], bytes], expected: str = REFUSED) -> Case:
    return Case(partial(change, work=work), expected)


def head_of(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # type: ignore[no-any-return]


def with_digest(data: bytes) -> bytes:
    """The file with the digest that fits it, as whoever knows the format can compute it."""
    at = data.index(b'digest\\":\\"') + len(b'digest\\":\\"')
    blank = data[:at] + b"0" * 32 + data[at + 32 :]
    return data[:at] + xxhash.xxh3_128_hexdigest(blank).encode() + data[at + 32 :]


def forge(place: Place, work: Callable[[Tensors, Record], None]) -> None:
    """Write the file anew with other tensors, another record and a right digest."""
    data = file_of(place).read_bytes()
    text = json.loads(head_of(data)["__metadata__"]["m3runtime"])
    tensors, record = safetensors.torch.load(data), text["codec"]
    work(tensors, record)
    record["tensors"] = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    blank = json.dumps({**text, "digest": "0" * 32}, sort_keys=True, separators=(",", ":"))
    file_of(place).write_bytes(with_digest(safetensors.torch.save(tensors, {"m3runtime": blank})))


def forged(work: Callable[[Tensors, Record], None], expected: str = REFUSED) -> Case:
    return Case(partial(forge, work=work), expected)


def decode(place: Place) -> str:
    """Decode any bytes with the codec of the file, as if the manifest named it: finite numbers, or refused."""
    codec = ProductCodec.load(file_of(place), SPEC)
    for width, fill in ((1, 0), (SPEC.tokens, 255), (7, None)):
        payloads = torch.randint(0, 256, (3, codec.payload_bytes(SPEC.tokens)), dtype=torch.uint8)
        if fill is not None:
            payloads.fill_(fill)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            memories = codec.decode(payloads, torch.tensor([width, 1, width]), dtype)
            assert torch.isfinite(memories.keys).all()
            assert torch.isfinite(memories.values).all()
    codec.encode(make_memories([3, SPEC.tokens], spec=SPEC))
    return "decoded"


def trusted(work: Callable[[Tensors, Record], None], expected: str = f"^refused: CodecError: .*/{CODEC}: ") -> Case:
    """Forged, and asked to decode: nothing but the codec itself can refuse it."""
    return Case(partial(forge, work=work), expected, act=decode)


def text(work: Callable[[str], str]) -> Case:
    """Other text in our part of the header, its length stated right, and a right digest."""

    def spoil(place: Place) -> None:
        data = file_of(place).read_bytes()
        size = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + size])
        head["__metadata__"]["m3runtime"] = work(head["__metadata__"]["m3runtime"])
        new = json.dumps(head, separators=(",", ":")).encode()
        new += b" " * (-len(new) % 8)
        whole = struct.pack("<Q", len(new)) + new + data[8 + size :]
        file_of(place).write_bytes(with_digest(whole) if b'digest\\":\\"' in new else whole)

    return Case(spoil, REFUSED)


def set_tensor(name: str, work: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Record], None]:
    return lambda tensors, _: tensors.update({name: work(tensors[name]).contiguous()})


def one(value: float) -> Callable[[Tensor], Tensor]:
    """The same numbers but for the first."""

    def work(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return work


def options(**some: Any) -> Callable[[Tensors, Record], None]:
    return lambda _, record: record.update(options={**record["options"], **some})


def spec(**some: Any) -> Callable[[Tensors, Record], None]:
    return lambda _, record: record.update(spec={**record["spec"], **some})


def record(**some: Any) -> Callable[[Tensors, Record], None]:
    return lambda _, record: record.update(some)


def sparse(place: Place) -> None:
    os.truncate(file_of(place), 100 << 30)


def sparse_and_says_so(place: Place, size: int) -> None:
    """A hole of so many bytes, that the header states as one tensor."""
    file = file_of(place)
    head = head_of(file.read_bytes())
    entries: dict[str, Any] = {"__metadata__": head["__metadata__"]}
    entries["mean"] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    data = json.dumps(entries, separators=(",", ":")).encode()
    file.write_bytes(struct.pack("<Q", len(data)) + data)
    os.truncate(file, 8 + len(data) + size)


def pipe(place: Place) -> None:
    file_of(place).unlink()
    os.mkfifo(file_of(place))


def folder(place: Place) -> None:
    file_of(place).unlink()
    file_of(place).mkdir()


def link(place: Place, target: str) -> None:
    file_of(place).unlink()
    file_of(place).symlink_to(target)


def gone(place: Place) -> None:
    file_of(place).unlink()


def another_banks(place: Place) -> None:
    shutil.copy(place.folder / "other" / "bank" / CODEC, file_of(place))


class Marking:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def a_pickle(place: Place) -> None:
    file_of(place).write_bytes(pickle.dumps(Marking(place.folder / "marker")))


def a_torch_file(place: Place) -> None:
    torch.save({"codec": Marking(place.folder / "marker")}, file_of(place))


def parts(*rows: tuple[int, int, int]) -> Callable[[Tensors, Record], None]:
    return lambda tensors, _: tensors.update(parts=torch.tensor(rows, dtype=torch.int32))


def length(value: int) -> Case:
    return changed(lambda data: struct.pack("<Q", value) + data[8:])


DEEP = "[" * 100_000 + "]" * 100_000
NESTED = "[" * 900 + "]" * 900


CASES: dict[str, Case] = {
    "nothing done": changed(lambda data: data, "^whole$"),
    "forged without a change": forged(lambda tensors, record: None, "^whole$"),
    "gone": Case(gone, REFUSED),
    "empty": changed(lambda data: b""),
    "seven bytes": changed(lambda data: data[:7]),
    "cut off in its header": changed(lambda data: data[:300]),
    "cut off": changed(lambda data: data[:-1]),
    "half": changed(lambda data: data[: len(data) // 2]),
    "a byte longer": changed(lambda data: data + b"\0"),
    "twice": changed(lambda data: data * 2),
    "zeros": changed(lambda data: bytes(len(data))),
    "text": changed(lambda data: b"codec: product\n"),
    "another bank's": Case(another_banks, REFUSED),
    "a header of 0 bytes": length(0),
    "a header of 1 byte": length(1),
    "a header of 2^63 bytes": length(2**63),
    "a header of 2^64 - 1 bytes": length(2**64 - 1),
    "a header of 3 MiB": length(3 << 20),
    "a header as long as the file": changed(lambda data: struct.pack("<Q", len(data)) + data[8:]),
    "a header that ends with the file": changed(lambda data: struct.pack("<Q", len(data) - 8) + data[8:]),
    "a hole of 100 GB": Case(sparse, REFUSED),
    "a hole of 100 GB that it states": Case(partial(sparse_and_says_so, size=100 << 30), REFUSED),
    "a hole of 7 GB that it states": Case(partial(sparse_and_says_so, size=7 << 30), REFUSED),
    "a hole of 100 MB that it states": Case(partial(sparse_and_says_so, size=100 << 20), REFUSED),
    "a pipe": Case(pipe, REFUSED),
    "a folder": Case(folder, REFUSED),
    "a link to nowhere": Case(partial(link, target="nowhere"), REFUSED),
    "a link to itself": Case(partial(link, target=CODEC), REFUSED),
    "a link to zeros without end": Case(partial(link, target="/dev/zero"), REFUSED),
    "a link to a folder": Case(partial(link, target="/"), REFUSED),
    "a pickle": Case(a_pickle, REFUSED),
    "a file of torch": Case(a_torch_file, REFUSED),
    "deep JSON": changed(lambda data: struct.pack("<Q", len(DEEP)) + DEEP.encode()),
    "deep JSON inside": text(lambda _: DEEP),
    "nested options": forged(options(together=json.loads(NESTED))),
    "no JSON inside": text(lambda _: "{"),
    "a list inside": text(lambda _: "[]"),
    "nothing of ours": text(lambda _: "{}"),
    "a key twice": text(lambda old: old.replace('"codec":', '"codec":{},"codec":')),
    "an option twice": text(lambda old: old.replace('"together":"layer"', '"together":"layer","together":"layer"')),
    "a format to come": text(lambda old: old.replace('"format":1', '"format":2')),
    "a format that is none": text(lambda old: old.replace('"format":1', '"format":"\\n\\n"')),
    "a format of 400 digits": text(lambda old: old.replace('"format":1', f'"format":{"9" * 400}')),
    "a number of 5000 digits": text(lambda old: old.replace('"format":1', f'"format":{"9" * 5000}')),
    "NaN where a number was": forged(record(measured={"keys": float("nan"), "values": 0.1})),
    "a distortion that is none": forged(record(measured={"keys": "1e-3", "values": []})),
    "a distortion of more": forged(record(measured={"keys": 0.1, "values": 0.1, "sinks": 0.1})),
    "another kind": forged(record(kind="scalar")),
    "a kind that is none": forged(record(kind=["product"])),
    "a kind to import": forged(record(kind="antigravity:Codec")),
    "options of a list": forged(record(options=["bytes"])),
    "options of another design": forged(record(options={"key_bytes": 4})),
    "options that nobody knows": forged(options(colour="red")),
    "an option called spec": forged(options(spec=None)),
    "bytes 0": forged(options(bytes=0)),
    "bytes 2^62": forged(options(bytes=2**62)),
    "bytes 11.0": forged(options(bytes=11.0)),
    "bytes as text": forged(options(bytes="12\n")),
    "fewer bytes": trusted(options(bytes=11)),
    "more bytes": trusted(options(bytes=13), "^decoded$"),
    "each head by itself": trusted(options(together="head")),
    "levels of 2^16 centroids": trusted(lambda _, record: record.update(options={"keys": "16x16", "values": "16x16"})),
    "a spec of more heads": forged(spec(kv_heads=2**40)),
    "a spec of heads that are no number": forged(spec(kv_heads=2.0)),
    "a spec of 2^20 layers": forged(spec(layers=list(range(1 << 20)))),
    "a spec of NaN": forged(spec(head_dim=float("nan"))),
    "a spec of another dtype": forged(spec(dtype="float16")),
    "no tensors": trusted(lambda tensors, _: tensors.clear()),
    "a tensor less": trusted(lambda tensors, _: tensors.__delitem__("mean")),
    "a tensor more": trusted(lambda tensors, _: tensors.update(more=torch.zeros(3))),
    "a tensor that is another": trusted(lambda t, _: t.update(main=t.pop("mean"))),
    "parts of nothing": trusted(lambda t, _: t.update(parts=torch.zeros(0, 3, dtype=torch.int32))),
    "parts of floats": trusted(set_tensor("parts", lambda x: x.float())),
    "parts of 64 bits": trusted(set_tensor("parts", lambda x: x.long())),
    "parts in one row": trusted(set_tensor("parts", lambda x: x.flatten())),
    "parts in another order": trusted(set_tensor("parts", lambda x: x.flip(0))),
    "a part twice": trusted(set_tensor("parts", lambda x: torch.cat([x[:1], x]))),
    "a part of a unit that is not there": trusted(set_tensor("parts", lambda x: x + torch.tensor([9, 0, 0]).int())),
    "a part of unit -1": trusted(set_tensor("parts", one(-1))),
    "parts beyond the channels": trusted(set_tensor("parts", lambda x: x + torch.tensor([0, 999, 0]).int())),
    "parts before the channels": trusted(set_tensor("parts", lambda x: x - torch.tensor([0, 1, 0]).int())),
    "a part as wide as an int can be": trusted(parts((0, 0, 2**31 - 1))),
    "a part that begins where an int ends": trusted(parts((0, 2**31 - 1, 1))),
    "a part of width 0": trusted(parts((0, 0, 0))),
    "a part of negative width": trusted(parts((0, 5, -4))),
    "a thousand parts": trusted(set_tensor("parts", lambda x: x.repeat(1000, 1))),
    "options of which the manifest does not know": forged(options(together="head")),
}
for tensor in ("mean", "forward", "inverse", "width2", "width3"):
    for kind, value in (("NaN", torch.nan), ("infinity", torch.inf), ("minus infinity", -torch.inf)):
        CASES[f"{kind} in {tensor}"] = trusted(set_tensor(tensor, one(value)))
    for kind, other in {
        "of float16": lambda x: x.half(),
        "of int32": lambda x: x.int(),
        "of complex64": lambda x: x.to(torch.complex64),
        "with a row less": lambda x: x[:-1],
        "with a dimension more": lambda x: x[None],
        "flat": lambda x: x.flatten(),
        "of one number": lambda x: torch.tensor(1.0),
        "of nothing": lambda x: x[:0],
    }.items():
        CASES[f"{tensor} {kind}"] = trusted(set_tensor(tensor, other))
    CASES[f"the largest numbers in {tensor}"] = trusted(
        set_tensor(tensor, lambda x: torch.full_like(x, torch.finfo(torch.float32).max)),
        "refused: CodecError" if tensor != "forward" else "refused: CodecError|^decoded$",
    )
    CASES[f"other numbers in {tensor}"] = trusted(set_tensor(tensor, lambda x: x + 1), "^decoded$")
    CASES[f"other numbers in {tensor}, of which the manifest does not know"] = forged(set_tensor(tensor, one(0.5)))


@pytest.mark.parametrize("name", CASES)
def test_codec_file(nursery: Nursery, name: str) -> None:
    check(nursery, __name__, CASES, name)


def test_what_the_file_of_a_codec_may_have_at_most_is_more_than_any_has() -> None:
    """The paper's memories, by the quantiser that takes most."""
    paper = MemorySpec(tuple(range(22)), 8, 8, 80, 128, "bfloat16")
    layer = 2 * 8 * 80
    assert isinstance(ProductCodec(paper).design, TransformDesign)
    matrices = 4 * 22 * (layer + 2 * layer**2 + 256 * layer + 3 * layer)
    levels = 4 * 22 * 8 * 80 * 2 * (2 * 2**14 + 80 + 1 + 2)
    assert max(matrices, levels) < files._most_bytes(paper)
