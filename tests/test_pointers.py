"""Files that git LFS left as pointers are called so wherever they are read, and a checkout's data may lie behind a link."""

import shutil

import pytest
from families import QUIET
from safetensors.torch import save_file
from test_formats import pickapic

from fashiondpo_pipeline import adapters, embedded, formats, lora_settings, workspace
from fashiondpo_pipeline.checkpoints import open_source
from fashiondpo_pipeline.errors import PULL, UserError
from fashiondpo_pipeline.experts.tower import Tower
from fashiondpo_pipeline.experts.weights import Place, read_weights

pytestmark = pytest.mark.filterwarnings(QUIET)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n"


def refused(call, *arguments):
    with pytest.raises(UserError) as problem:
        call(*arguments)
    return str(problem.value)


@pytest.mark.parametrize(("name", "read"), [
    ("it.parquet", workspace.read_parquet), ("it.safetensors", lora_settings.open_lora),
    (adapters.FILE, lambda file: adapters.check_file(file.parent)),
    ("w.safetensors", lambda file: read_weights(Place(str(file), "weights", None))),
    ("w.pt", lambda file: read_weights(Place(str(file), "weights", None))),
])
def test_a_pointer_is_called_one(tmp_path, name, read):
    (tmp_path / name).write_bytes(POINTER)
    assert refused(read, tmp_path / name) == f"{tmp_path / name} is a git LFS pointer, not the file itself: {PULL}"


@pytest.mark.parametrize(("name", "beside"), [(f"train.{kind}", False) for kind in ("parquet", "arrow", "jsonl", "csv", "tar")] +
                         [("train.parquet", True), ("train.arrow", True)])
def test_an_import_of_pointers_says_what_fetches_them(tmp_path, name, beside):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(POINTER)
    if beside:  # a sound file: then the pointer is counted, with the same words
        pickapic(tmp_path / "set" / "train-2.parquet")
        found = formats.read("pickapic", tmp_path / "set", tmp_path / "out")
        assert any("git LFS pointer" in reason for reason in found.manifest["dropped"]), found.manifest["dropped"]
    else:
        told = refused(formats.read, "pickapic", tmp_path / "set" / name, tmp_path / "out")
        assert "is a git LFS pointer" in told and "`git lfs pull` fetches the file" in told and "Parquet" not in told


def test_a_model_whose_weights_are_pointers_is_told(tiny_sd, tiny_clip, tmp_path):
    import torch

    calls = {tiny_sd: lambda at: open_source(str(at)).part("unet", torch.float32), tiny_clip: lambda at: Tower(f"local-dir:{at}").load()}
    for there, call in calls.items():
        at = tmp_path / there.name
        shutil.copytree(there, at)
        weights = next(file for file in sorted(at.rglob("*.safetensors")) if file.parent.name in ("unet", at.name))
        weights.write_bytes(POINTER)
        assert refused(call, at).startswith(f"{weights} is a git LFS pointer")


def test_data_of_a_checkout_may_be_a_link(tmp_path, monkeypatch):
    real = tmp_path / "elsewhere"
    (real / "fashion_mini").mkdir(parents=True)
    save_file({}, real / "fashion_mini" / "x.safetensors")
    (tmp_path / "data").symlink_to(real)
    monkeypatch.setattr(embedded, "root", lambda: tmp_path / "data")
    assert embedded.locate("embedded:fashion_mini/x.safetensors").is_file()
    assert "leaves the embedded data" in refused(embedded.locate, "embedded:../x")
