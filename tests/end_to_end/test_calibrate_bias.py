"""``m3 calibrate-bias``, and what other commands say of the file that it leaves in a bank."""

import copy
import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch

from m3runtime import assembly
from m3runtime.bank.bias import BIAS, BiasDirections
from m3runtime.config.schema import Config
from tests.end_to_end.commands import Place, records
from tests.end_to_end.conftest import NewPlace
from tests.model.families import make_model, make_tokenizer, random_text

CALIBRATE = ("calibrate-bias", "--length", "64")


@pytest.fixture(scope="module")
def calibrated_once(tmp_path_factory: pytest.TempPathFactory, new_place: NewPlace) -> tuple[Place, str]:
    """A bank whose model has bias directions, with them, and what was printed."""
    place = new_place(tmp_path_factory.mktemp("calibrated"))
    model = copy.deepcopy(make_model("llama"))
    torch.manual_seed(1)
    with torch.no_grad():  # queries have much in common in models that were trained
        table = model.get_input_embeddings().weight
        table += 5.0 * table.std() * torch.randn(table.shape[1])
    model.save_pretrained(place.folder / "model")
    make_tokenizer().save_pretrained(place.folder / "model")
    place.configure(model={"path": "./model"})
    place.text("notes.jsonl", records(random_text(make_tokenizer(), 20, seed=seed) for seed in range(12)))
    assert place.m3("write", "notes.jsonl").code == 0
    result = place.m3(*CALIBRATE)
    assert result.code == 0, result.err
    return place, result.out


@pytest.fixture
def calibrated(calibrated_once: tuple[Place, str], tmp_path: Path) -> Place:
    shutil.copytree(calibrated_once[0].folder, tmp_path / "calibrated")
    return Place(tmp_path / "calibrated")


def load(place: Place) -> BiasDirections | None:
    config = Config.load(place.file, environ={})
    with closing(assembly.open_bank(config, read_only=True)) as bank:
        return BiasDirections.load(bank.path, bank.manifest)


def test_for_people(calibrated_once: tuple[Place, str]) -> None:
    place, said = calibrated_once
    first, *stretches, null, weights, written = said.splitlines()
    assert first.startswith("bias directions of 4 layers and 2 KV heads, measured at 64 positions;")
    assert len(stretches) == 8
    assert null.startswith("null slots: good at -")
    assert weights.startswith("weights: ")
    assert written == f"written: {place.bank / BIAS}"


def test_as_json_again_with_the_same_result(calibrated: Place) -> None:
    before = load(calibrated)
    said = calibrated.m3(*CALIBRATE, "--json").json
    after = load(calibrated)
    assert before is not None
    assert after is not None
    assert (said["length"], said["file"]) == (64, str(calibrated.bank / BIAS))
    assert said["null_level"] == after.facts.null_level > 0
    torch.testing.assert_close(after.directions, before.directions)
    assert {path.name for path in calibrated.bank.iterdir()} == {BIAS, "codec.safetensors", "home", "index"}


def test_a_dry_run_measures_and_writes_nothing(calibrated: Place) -> None:
    (calibrated.bank / BIAS).unlink()
    result = calibrated.m3(*CALIBRATE, "--dry-run")
    assert result.out.endswith("nothing was written\n")
    assert calibrated.m3(*CALIBRATE, "--dry-run", "--json").json["file"] is None
    assert load(calibrated) is None


def test_other_text_gives_other_directions(calibrated: Place) -> None:
    before = load(calibrated)
    text = random_text(make_tokenizer(), 200, seed=99)
    calibrated.text("other.txt", text)
    assert calibrated.m3(*CALIBRATE, "--text", "other.txt").code == 0
    after = load(calibrated)
    assert before is not None
    assert after is not None
    assert not torch.equal(after.directions, before.directions)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--length", "6000"), "--length 6000: after the memories this model has "),
        (("--text", "short.txt"), "too few references (1)"),
        (("--text", "absent.txt"), "absent.txt"),
        (("--length", "3"), "--length"),
    ],
)
def test_what_cannot_be_calibrated(calibrated: Place, arguments: tuple[str, ...], said: str) -> None:
    calibrated.text("short.txt", "the harbour lamp")
    before = (calibrated.bank / BIAS).read_bytes()
    result = calibrated.m3("calibrate-bias", *arguments)
    assert result.code == 2
    assert said in result.err
    assert (calibrated.bank / BIAS).read_bytes() == before


def test_a_model_without_directions_is_refused(written: Place) -> None:
    result = written.m3("calibrate-bias", "--length", "64")
    assert result.code == 2
    assert "has no bias directions over 64 positions" in result.err.splitlines()[-1]
    assert not (written.bank / BIAS).exists()


def test_without_a_bank(place: Place) -> None:
    result = place.m3(*CALIBRATE)
    assert (result.code, "there is no bank" in result.err) == (2, True)


def test_inspect_says_what_the_file_is(calibrated: Place, written: Place) -> None:
    facts = calibrated.m3("inspect", "--json").json
    assert facts["bias"]["length"] == 64
    assert facts["bias"]["bytes"] == (calibrated.bank / BIAS).stat().st_size
    assert "bias:\n" in calibrated.m3("inspect").out
    assert "bias" not in written.m3("inspect", "--json").json


def test_forgetting_compacting_and_training_leave_the_file(calibrated: Place) -> None:
    before = (calibrated.bank / BIAS).read_bytes()
    for command in (["forget", "0", "--erase"], ["compact"], ["codec", "refit"], ["verify"]):
        assert calibrated.m3(*command).code == 0, command
    assert (calibrated.bank / BIAS).read_bytes() == before


def test_damage_is_found_and_repaired_by_calibrating_again(calibrated: Place) -> None:
    path = calibrated.bank / BIAS
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    result = calibrated.m3("verify", "--json")
    assert result.code == 1
    (damage,) = json.loads(result.out)["damage"]
    assert damage["where"] == "bias"
    assert "digest does not match" in damage["what"]
    assert "m3 calibrate-bias" in calibrated.m3("verify").out
    assert "digest does not match" in str(calibrated.m3("inspect", "--json").json["bias"])
    assert calibrated.m3(*CALIBRATE).code == 0
    assert calibrated.m3("verify").code == 0
