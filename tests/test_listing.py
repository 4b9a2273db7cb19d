"""`fdpo experts` says what there is and whether weights are here; it loads no model and asks no network."""

import json
import subprocess
import sys

import pytest
import torch
from whole_runs import works

from fashiondpo_pipeline import experts
from fashiondpo_pipeline.config import Expert
from fashiondpo_pipeline.experts.listing import kinds, weights
from fashiondpo_pipeline.registry import EXPERTS

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_every_built_in_says_what_it_is():
    found = {kind.name: kind for kind in kinds({})}
    assert set(found) >= set(EXPERTS.builtin)
    for name in EXPERTS.builtin:
        kind = found[name]
        assert kind.origin == "built in" and kind.fault is None and kind.version >= 1
        assert kind.about.endswith((".", ":")) and kind.needs, name
    assert found["attributes"].options["choices"] is ... and found["attributes"].options["temperature"] == 0.01
    assert found["classifier"].range == [None, 0] and found["classifier"].needs == ["picture"]
    assert found["sharpness"].options == {}


def test_no_kind_imports_torch():
    code = "import sys; from fashiondpo_pipeline.experts.listing import kinds; kinds({}); print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert told.stdout == "False\n"


def test_a_module_that_cannot_be_imported_is_listed_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "broken_expert.py").write_text("raise ValueError('not today')")
    monkeypatch.syspath_prepend(str(tmp_path))
    used = {"a": Expert(use="broken_expert:Thing"), "b": Expert(use="nowhere:Thing"), "c": Expert(use="fashiondpo_pipeline.testing:Brightness")}
    broken, nowhere, toy = kinds(used)[-3:]
    assert broken.fault == "cannot be imported (ValueError: not today)" and broken.origin == "module broken_expert"
    assert nowhere.fault.startswith("the expert 'nowhere:Thing' cannot be imported (")
    assert toy.fault is None and toy.range == [0, 1] and toy.about == "A toy expert: mean brightness of a picture, in [0, 1]. Needs no weights."


def test_what_is_not_here_is_said(place):
    head, tower = place / "head.pth", "experts.clip_t.options.model"
    sets = ("--set", f"experts.taste={{use: aesthetic, options: {{head: {head}}}}}", "--set", f"experts.pick={{use: pickscore, options: "
            f"{{model: 'hf://me/pick@{COMMIT}'}}}}", "--set", "experts.odd={use: attributes, options: {choices: [a, b]}}")
    told = json.loads(works("experts", "--json", *sets).out)
    used = {one["name"]: one for one in told["experts"]}
    assert [(read["role"], read["here"]) for read in used["taste"]["reads"]] == [("tower", False), ("head", False)]
    assert [(read["role"], read["here"]) for read in used["pick"]["reads"]] == [("model", False), ("processor", False)]
    assert used["clip_t"]["weight"] == 1.0 and [read["here"] for read in used["clip_t"]["reads"]] == [True]
    assert used["bright"]["reads"] == []
    assert used["odd"]["fault"] == ("experts.odd.options.model: missing; add it\nexperts.odd.options.attribute: missing; add it")
    torch.save({}, head)
    shown = works("experts", *sets).out
    assert f"head {head}" in shown and "NOT HERE" in shown and "needs no weights" in shown and "watched" in shown
    assert "experts.odd.options.model: missing; add it" in shown
    taste = [line for line in shown.splitlines() if line.startswith("taste") or f"head {head}" in line]
    assert taste[0].split()[-2:] == ["NOT", "HERE"] and taste[1].split()[-1] == "here"
    assert "NOT HERE" in works("experts", "--set", f"{tower}=local-dir:gone").out


def test_an_expert_whose_weights_are_not_there_is_told_beside_the_others(place):
    tables = ("outfits: 'embedded:fashion_mini/outfits/outfits.parquet', items: 'embedded:fashion_mini/catalog.parquet'")
    goes = ("--set", f"experts.goes={{use: compatibility, options: {{model: 'local-dir:embedded:fashion_mini/clip', weights: heads, {tables}}}}}")
    told = {one["name"]: one for one in json.loads(works("experts", "--json", *goes).out)["experts"]}
    fault = "there is no compatibility expert in heads: `fdpo expert train compatibility` makes one"
    assert told["goes"]["fault"] == fault and told["goes"]["version"] == 1
    assert [read["here"] for read in told["clip_t"]["reads"]] == [True]
    shown = works("experts", *goes).out
    assert fault in shown and "cannot be used: see below" in shown and "clip_t" in shown


def test_public_towers_are_looked_for_in_the_hubs_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    clip = experts.make("it", "clip_text", {"model": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"})
    (tower,) = weights(clip)
    assert (tower.role, tower.place, tower.here) == ("tower", "ViT-B-32/laion2b_s34b_b79k", False)
    folder = tmp_path / "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "open_clip_model.safetensors").touch()
    assert weights(clip)[0].here


@pytest.mark.parametrize("here", [True, False])
def test_a_stated_file_is_a_tower_that_is_here(tmp_path, here):
    path = tmp_path / "clip.pt"
    if here:
        path.touch()
    clip = experts.make("it", "clip_text", {"model": "ViT-B-32", "pretrained": str(path)})
    assert weights(clip)[0].here is here


def test_a_classifier_of_the_hub_is_looked_for_in_its_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    judge = experts.make("it", "classifier", {"model": "me/judge", "label": "x", "revision": COMMIT})
    assert [(read.place, read.here) for read in weights(judge)] == [("me/judge", False)]
    folder = tmp_path / "models--me--judge" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    assert weights(judge)[0].here
    assert not weights(experts.make("it", "classifier", {"model": "models/of/mine", "label": "x"}))[0].here
