"""Training on imported pairs: no sampler, each picture through the VAE once; refusals in a sentence; sets drawn for annotation."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from test_formats import painted, pickapic
from whole_runs import fdpo, folder_of, manifests, refused, session, works

from fashiondpo_pipeline import adapters, pairsets, report
from fashiondpo_pipeline.codecs import decode_half, decode_picture, encode_png
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.pairsets import PairSet
from stages.latents import fitted
from stages.single import section_of

DPO = ("--set", "finetune.objective=diffusion_dpo", "--set", "finetune.noise=fresh")


def test_one_command_trains_on_a_pick_a_pic_file_and_evaluates_on_the_runs_prompts(place):
    pickapic(place / "p.parquet")
    told = works("finetune", "--pairs", "p.parquet", *DPO)
    assert "imported p.parquet as pickapic: 8 pictures, 4 pairs (2 with a winner, 1 ties, 1 not labelled)" in told.err
    made = manifests(place / "runs" / "t")
    assert sorted(path.split("/")[1].rpartition("-")[0] for path in made) == ["encode-pairs", "finetune", "latents", "pair"], "nothing was drawn"
    numbers = next(m["numbers"] for path, m in made.items() if "/finetune-" in path)
    assert numbers["pairs"] == 2 and numbers["first_loss"] == pytest.approx(np.log(2), abs=1e-4) and numbers["steps"] == 2
    assert "done already" in works("finetune", "--pairs", "p.parquet", *DPO).err, "nothing is imported or trained twice"

    told = works("evaluate", "--pairs", "p.parquet", *DPO)
    assert "prefers it to the base in" in told.err
    (page,) = (place / "runs" / "t").glob("imported-*.html")
    text = page.read_text()
    assert all(words in text for words in ("pickapic: p.parquet", "Checks before training", "winner minus loser", "loss, first and last step",
                                           "bright prefers it to the base", "What was learnt from", "Before and after"))
    shown = re.findall(r'<img src="data:image/[a-z]+;base64,([^"]+)"', text)
    run = session(*DPO[1::2])
    drawn = 2 * run.config.evaluate.pictures * len(run.prompts["held-out"])  # of base and round
    pictures = 2 * 2 + drawn + drawn  # of both pairs; by what became of each, which are few enough to be shown all; by prompt
    assert len(shown) == pictures and all(decode_picture(base64.b64decode(one), "").size for one in shown)
    assert text.count("<svg") == 6, "the gains, four curves of finetuning, and where in the walk it learns"
    style = (Path(report.__file__).parent / "templates" / "report.css").read_text()
    assert style.strip() in text, "it looks like the other report"
    assert "Only 2 pairs to learn from" in text and "Only 2 optimiser steps" in text
    assert "warning: only 2 pairs to learn from" in told.err
    works("generate", "a red dress", "--pairs", "p.parquet", "--count", "1", "--out", "drawn", *DPO)
    assert len(list((place / "drawn").iterdir())) == 1
    works("export", "out", "--pairs", "p.parquet", "--format", "kohya", *DPO)
    assert (place / "out" / "t-round1.safetensors").is_file()


def test_what_was_trained_on_imported_pairs_is_named_once(place):
    pickapic(place / "p.parquet")
    works("import", "pickapic", "p.parquet", "--out", "my set")
    told = works("finetune", "--pairs", "my set", *DPO, "--set", "finetune.beta=50", "--set", "evaluate.pictures=1").err
    assert told.endswith('next: fdpo evaluate --pairs "my set" --set evaluate.pictures=1\n')  # its own settings are found again
    (first,) = (place / "runs/t/round-01").glob("finetune-*")
    lines = works("status").out.splitlines()
    assert not [line for line in lines if " stale " in line] and max(map(len, lines)) < 120
    assert works("status").err == f"next: fdpo evaluate --pairs {first.name[-8:]}\n"

    told = works("evaluate", "--pairs", "my set", "--set", "evaluate.pictures=1").err
    assert told.startswith(f"with the settings of training {first.name[-8:]}: finetune.beta=50.0, finetune.noise=fresh, "
                           "finetune.objective=diffusion_dpo\n")
    assert "prefers it to the base in" in told and told.splitlines()[-1].startswith("next: fdpo generate ")
    for call in (["generate", "a red dress", "--count", "1", "--out", "drawn"], ["export", "out"], ["inspect", "steps"]):
        assert "with the settings of training" in works(*call, "--pairs", "my set").err
    assert len(manifests(place / "runs/t")) == len([*(place / "runs/t").glob("round-*/*/claim.json")])

    works("finetune", "--pairs", "my set", *DPO)  # another one, with other settings: the latest is meant, and the other is named by its id
    (second,) = {*(place / "runs/t/round-01").glob("finetune-*")} - {first}
    told = works("export", "latest", "--pairs", "my set").err
    assert told.startswith(f"with the settings of training {second.name[-8:]}: finetune.noise=fresh, finetune.objective=diffusion_dpo; "
                           f"there are others on these pairs, named by --pairs {first.name[-8:]}\n")
    works("export", "earlier", "--pairs", first.name[-8:])
    file = adapters.FILE
    assert (place / "earlier" / file).read_bytes() == (place / "out" / file).read_bytes() == (first / "adapter" / file).read_bytes()
    assert (place / "latest" / file).read_bytes() == (second / "adapter" / file).read_bytes()


def test_settings_given_by_hand_are_not_replaced_by_those_of_a_training(place):
    pickapic(place / "p.parquet")
    works("finetune", "--pairs", "p.parquet", *DPO)
    said = refused("evaluate", "--pairs", "p.parquet", *DPO, "--set", "finetune.beta=9")
    assert "which is not there with these settings" in said and "finetune.beta=9" in said
    told = works("evaluate", "--pairs", "p.parquet", *DPO[:2], "--set", "evaluate.pictures=1").err  # those that it had do not stand in its way
    assert told.startswith("with the settings of training") and ": finetune.noise=fresh\n" in told


def test_hostile_names_and_prompts_do_nothing_on_the_page(place):
    pickapic(place / "<script>alert(1)<!--.parquet", caption=["<img src=x onerror=alert(1)>"] * 4, jpg_1=[painted(0, "JPEG")] * 4)
    works("finetune", "--pairs", "<script>alert(1)<!--.parquet", *DPO)
    (page,) = (place / "runs" / "t").glob("imported-*.html")
    text = page.read_text()
    assert "<script" not in text and "<img src=x" not in text and "&lt;script&gt;" in text and "&lt;img src=x" in text
    assert set(re.findall(r'<img src="([^:]*:)', text)) == {"data:"}, "nothing is asked of anybody"


def test_latents_are_the_vaes_of_the_fitted_pictures_and_training_meets_the_winner_and_the_loser(place):
    pickapic(place / "p.parquet")
    works("import", "pickapic", "p.parquet", "--out", "set")
    works("finetune", "--pairs", "set", *DPO)
    run = session(*DPO[1::2])
    pairs = PairSet.open("set")
    r = run.chain(1, {1: pairs}).rounds[1]
    table = run.output(r.sample).table("trajectories").to_pylist()
    assert [(row["group"], row["candidate"]) for row in table] == [(row["group"], n) for n, row in enumerate(table)] and len(table) == 4
    generator = run.generator()
    size = (16, 16)
    pixels = np.stack([np.asarray(fitted(pairs.picture(row["group"], row["candidate"]), size)) for row in table])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = generator.vae.encode(x).latent_dist.mean * generator.vae.config.scaling_factor
    found = decode_half([row["x_0"] for row in table], generator.latent_shape)
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-3)
    labels = run.output(r.pair).table("pairs", ["winner", "loser"]).to_pylist()
    assert labels == [{"winner": 0, "loser": 1}, {"winner": 3, "loser": 2}]


def test_a_picture_of_another_shape_is_scaled_to_cover_and_cut_in_the_middle():
    pixels = np.zeros((10, 20, 3), np.uint8)  # a quarter red, a half green, a quarter blue
    pixels[:, :5, 0] = pixels[:, 5:15, 1] = pixels[:, 15:, 2] = 255
    found = np.asarray(fitted({"group": "g", "candidate": 0, "picture": {"bytes": encode_png(pixels)}}, (8, 8)))  # as 16 x 8, less 4 on each side
    assert found.shape == (8, 8, 3) and (found[:, 1:-1] > [-1, 230, -1]).all() and (found[:, 1:-1] < [25, 256, 25]).all()
    assert (fitted({"group": "g", "candidate": 0, "picture": {"bytes": painted(0)}}, (10, 12)) == decode_picture(painted(0), ""))


@pytest.mark.parametrize(("sets", "words"), [
    (["finetune.objective=step_dpo"], "finetune.objective step_dpo needs the steps that a sampler took"),
    (["finetune.objective=ipo"], "finetune.objective ipo needs the steps that a sampler took"),
    (["finetune.objective={diffusion_dpo: 1, margin_dpo: 1}", "finetune.signal=error"], "finetune.objective margin_dpo needs experts' scores"),
    (["finetune.objective=diffusion_dpo", "finetune.replay=0.2"], "finetune.replay"),
    (["finetune.objective=cdpo", "finetune.signal=error", "finetune.options={label_smoothing: auto}"],
     "finetune.options.label_smoothing is auto, which is measured by asking experts twice, and imported pairs were made by none of them: give it a"),
])
def test_what_needs_a_samplers_record_is_refused_and_told_what_fits(place, sets, words):
    pickapic(place / "p.parquet")
    sentence = refused("finetune", "--pairs", "p.parquet", *(part for text in sets for part in ("--set", text)))
    assert words in sentence
    if "objective" in words:
        assert "use diffusion_dpo, dspo, mapo, or with finetune.signal error one of anchor, cdpo" in sentence
    assert not list((place / "runs").glob("t/imported/*")) and not manifests(place / "runs" / "t"), "at once"


def test_an_objective_that_can_take_errors_and_looks_at_every_picture_trains_too(place):
    pickapic(place / "p.parquet")
    works("finetune", "--pairs", "p.parquet", "--set", "finetune.objective=kto", "--set", "finetune.signal=error")


def test_pairs_that_are_nowhere_or_unlabelled_or_of_no_known_format_are_told_so(place):
    assert "there is no sets/gone" in refused("finetune", "--pairs", "sets/gone", *DPO)
    (place / "odd.bin").write_bytes(b"?")
    assert "is in no format that is known at sight: `fdpo import FORMAT odd.bin`" in refused("finetune", "--pairs", "odd.bin", *DPO)
    pairsets.write("bare", [{"group": "g", "candidate": n, "prompt": "p", "picture": {"bytes": painted(n)}} for n in (0, 1)],
                   [{"group": "g", "first": 0, "second": 1}], {})
    sentence = refused("finetune", "--pairs", "bare", *DPO)
    assert "no pair in it has a winner (0 ties, 1 not labelled, 0 of pictures that are not there): label some" in sentence
    with pytest.raises(UserError, match="has no pairs 0123abcd"):
        section_of(session(), 1, "0123abcd")


def a_set(folder, *pairs):
    """A set of four pictures of one prompt; pairs: (first, second, label)."""
    pictures = [{"group": "g", "candidate": n, "prompt": "a red dress", "picture": {"bytes": painted(n)}} for n in range(4)]
    return pairsets.write(folder, pictures, [dict(zip(("group", "first", "second", "label"), ("g", *pair), strict=True)) for pair in pairs], {})


def trained(place, folder, *sets):
    """(loss of every step, the adapter's weights) of a finetuning on a set."""
    works("finetune", "--pairs", folder, *DPO, *(part for text in sets for part in ("--set", text)))
    run = session(*DPO[1::2], *sets)
    out = run.output(run.chain(1, {1: PairSet.open(folder)}).rounds[1].finetune)
    (file,) = (out.folder / "adapter").glob("*.safetensors")
    return out.table("steps")["loss"].to_pylist(), load_file(file)


@pytest.mark.parametrize("guard", ["null", "0.9"])
def test_a_pair_that_three_of_four_people_chose_trains_as_their_four_pairs_do_and_not_as_a_hard_win(place, guard):
    sets = [f"finetune.guard={guard}", "finetune.learning_rate=0.01", "finetune.epochs=4"]
    a_set("share", (0, 1, 0.75))
    a_set("people", (0, 1, 1.0), (0, 1, 1.0), (0, 1, 1.0), (0, 1, 0.0))
    a_set("hard", (0, 1, 1.0))
    (loss, weights), (same, equal), (other, _) = (trained(place, name, *sets) for name in ("share", "people", "hard"))
    assert loss == pytest.approx(same, abs=1e-6) and loss[0] == pytest.approx(np.log(2), abs=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, equal[name], atol=1e-6, rtol=1e-4)
    assert abs(loss[-1] - other[-1]) > 1e-4


def test_a_set_with_shares_has_claims_of_its_own_and_one_without_has_those_it_had(place):
    hard, soft = a_set("hard", (0, 1, 1.0), (2, 3, 0.5), (1, 2, None)), a_set("soft", (0, 1, 1.0), (3, 2, 0.25))
    claims = [session(*DPO[1::2]).chain(1, {1: pairs}).rounds[1].pair.config for pairs in (hard, soft)]
    assert claims == [{}, {"shares": True}] and (hard.shares, soft.shares) == (0, 1)
    works("finetune", "--pairs", "soft", *DPO)
    run = session(*DPO[1::2])
    table = run.output(run.chain(1, {1: soft}).rounds[1].pair).table("pairs")
    assert [tuple(row.values()) for row in table.select(["winner", "loser", "share"]).to_pylist()] == [(0, 1, 1.0), (2, 3, 0.75)]


def test_an_objective_that_cannot_weigh_shares_is_refused_by_name(place):
    a_set("soft", (0, 1, 0.7))
    sets = ("--set", "finetune.objective=kto", "--set", "finetune.signal=error")
    sentence = refused("finetune", "--pairs", "soft", *sets)
    assert "finetune.objective kto takes a picture as good or bad, and labels of these pairs are shares" in sentence
    a_set("hard", (0, 1, 1.0))
    works("finetune", "--pairs", "hard", *sets)


@pytest.mark.parametrize(("pairs", "ranking"), [
    ([(0, 1, 1.0), (2, 1, 0.0), (0, 2, 1.0)], {0: 2, 1: 1, 2: 0}), ([(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.5)], {0: 2, 1: 0.5, 2: 0.5}),
    ([(0, 1, 1.0), (1, 0, 0.0)], {0: 1, 1: 0}), ([(0, 1, 1.0), (1, 2, 1.0)], None), ([(0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0)], None),
    ([(0, 1, 1.0), (1, 0, 1.0)], None), ([(0, 1, 0.75)], None), ([(0, 1, 1.0), (0, 1, None)], None), ([(0, 0, 1.0)], None)])
def test_pairs_are_a_ranking_where_each_two_were_compared_and_all_agree(pairs, ranking, tmp_path):
    assert a_set(tmp_path / "set", *pairs).rankings == {"g": ranking}


@pytest.mark.parametrize("objective", ["plackett_luce", "rankdpo"])
def test_objectives_of_an_order_train_on_ranked_pictures_and_refuse_what_is_no_ranking(place, objective):
    a_set("ranked", (0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0))
    a_set("turned", (0, 1, 0.0), (0, 2, 0.0), (1, 2, 0.0))
    sets = [f"finetune.objective={objective}", "finetune.learning_rate=0.01", "finetune.epochs=4"]
    losses, weights = zip(*(trained(place, name, *sets, "finetune.signal=error") for name in ("ranked", "turned")), strict=True)
    assert losses[0][-1] < losses[0][0] and not all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())
    a_set("loose", (0, 1, 1.0), (1, 2, 1.0))
    sentence = refused("finetune", "--pairs", "loose", *DPO, *(part for text in (*sets, "finetune.signal=error") for part in ("--set", text)))
    assert f"finetune.objective {objective} needs a ranking of each prompt's pictures, and of 1 of 1 prompts the pairs are none" in sentence


def test_a_pair_of_a_picture_that_is_not_there_is_told_and_left_out(place):
    a_set("set", (0, 1, 1.0), (2, 9, 1.0), (3, 2, 0.0))
    told = works("finetune", "--pairs", "set", *DPO)
    assert "round 1 pairs: warning: 1 pairs name a picture that is not in the set, such as one of 'g'" in told.err
    (pair,) = (m["numbers"] for path, m in manifests(place / "runs" / "t").items() if "/pair-" in path)
    assert pair["pairs"] == 2 and pair["dangling"] == 1


def test_a_set_that_was_altered_is_refused_before_anything_is_encoded(place):
    file = a_set("set", (0, 1, 1.0)).folder / "pictures-00000.parquet"
    data = bytearray(file.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1
    file.write_bytes(data)
    assert refused("finetune", "--pairs", "set", *DPO).startswith(f"{file}: altered since the set was made")
    assert not manifests(place / "runs" / "t")


def test_an_imported_round_is_named_by_status_and_opened_by_inspect(place):
    a_set("set", (0, 1, 1.0), (3, 2, 0.0))
    assert "round 1: finetune has not been run on these pairs" in (sentence := refused("inspect", "steps", "--pairs", "set", *DPO))
    assert f"`fdpo finetune --round 1 --pairs set {' '.join(DPO)}` does it" in sentence
    works("finetune", "--pairs", "set", *DPO)
    told = works("status", *DPO)
    named = [line for line in told.out.splitlines() if "imported pairs: set" in line]
    assert [line.split()[2].rpartition("-")[0] for line in named] == ["pair", "encode-pairs", "latents", "finetune"]
    assert all(" done " in line for line in named) and "results of other settings" not in told.err
    told = works("inspect", "steps", "--pairs", "set", *DPO)
    assert "round 1 · 2 steps" in told.out
    assert "which `fdpo studio` shows" in refused("inspect", "pairs", "--pairs", "set", *DPO)
    assert f"`fdpo evaluate --round 1 --pairs set {' '.join(DPO)}` does it" in refused("inspect", "candidates", "--held-out", "--pairs", "set", *DPO)


def test_status_verifies_the_pair_sets_in_a_run_too(place):
    pickapic(place / "p.parquet")
    works("finetune", "--pairs", "p.parquet", *DPO)
    a_set(place / "runs" / "t" / "labels" / "ann", (0, 1, 1.0))
    assert "every file is as it was written" in works("status", "--verify").err
    (picture,), label = (place / "runs" / "t").glob("imported/*/pictures-00000.parquet"), place / "runs" / "t" / "labels" / "ann"
    data = bytearray(picture.read_bytes())
    data[data.index(b"JFIF") + 20] ^= 1
    picture.write_bytes(data)
    (label / "pairs-00000.parquet").unlink()
    for options in (["--verify"], ["--repair"]):
        told = fdpo("status", *options)
        assert told.code == 1 and f"{picture.relative_to(place)}: altered" in told.err and "labels/ann/pairs-00000.parquet is missing" in told.err
        assert told.err.endswith("fdpo: damaged pair sets: take them away, then import them, or save what people said, again\n")
    assert label.is_dir() and picture.is_file(), "nothing of the user's is dropped"


def test_sets_are_drawn_with_a_style_lora_and_go_on_where_they_were_stopped(place):
    run = session()
    generator = run.generator()
    adapters.attach(generator.denoiser, 2, 2.0, "attention", 3)
    for name, weight in adapters.parameters(generator.denoiser).items():
        if "lora_B" in name:
            weight.data.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.5)
    generator.save_adapter(place / "style")
    style = place / "style" / "pytorch_lora_weights.safetensors"
    (place / "few.txt").write_text("a red dress\na blue hat\na green bag\n")
    works("generate-sets", "--lora", style, "--prompts", "few.txt", "--set-size", "3", "--out", "sets")
    made = PairSet.open("sets")
    assert made.counts == {"pictures": 9, "pairs": 9, "labelled": 0, "ties": 0} and made.manifest["lineage"]["lora"] == str(style)
    assert "is there already" in refused("generate-sets", "--prompts", "few.txt", "--out", "sets")

    drawn = folder_of(place / "runs" / "t", 0, "sets")
    (drawn / "manifest.json").unlink()
    (drawn / "parts" / "00001.json").unlink()  # as if it had been killed before the last shard was there
    before = (drawn / "parts" / "candidates-00000.parquet").stat().st_mtime_ns
    works("generate-sets", "--lora", style, "--prompts", "few.txt", "--set-size", "3", "--out", "again")
    assert PairSet.open("again").identity == made.identity
    assert (drawn / "parts" / "candidates-00000.parquet").stat().st_mtime_ns == before
    works("generate-sets", "--prompts", "few.txt", "--set-size", "3", "--out", "plain")
    assert PairSet.open("plain").identity != made.identity


def test_import_and_export_say_what_they_did_and_what_they_left_out(place):
    pickapic(place / "p.parquet", label_1=[0.0, 1.0, 1.0, 0.5])
    told = works("import", "pickapic", "p.parquet")
    assert told.out == "pairs/p\n"
    assert "6 pictures, 3 pairs (2 with a winner, 0 ties, 1 not labelled); 1 left out: 1 x label_0 and label_1 do not add up to 1" in told.err
    assert json.loads((place / "pairs" / "p" / "checks.json").read_text())["pairs"] == 2
    told = works("export-pairs", "folders", "wl", "--from", "pairs/p")
    assert told.out == "wl\n" and "2 pairs" in told.err and "left out: 1 x the pair has no label" in told.err
    assert "give one of them" in refused("export-pairs", "csv", "x", "--from", "pairs/p", "--round", "1")
    assert "did you mean 'pickapic'" in refused("import", "pickpic", "p.parquet")
    assert "there is no q.parquet" in refused("import", "pickapic", "q.parquet")


def test_import_and_export_leave_alone_what_is_there_and_say_where_they_cannot_write(place):
    (place / "shoes").mkdir()
    pickapic(place / "shoes" / "pairs-of-shoes.parquet")
    before = (place / "shoes" / "pairs-of-shoes.parquet").read_bytes()
    assert "shoes is there already and is not empty" in refused("import", "pickapic", "shoes", "--out", "shoes")
    assert (place / "shoes" / "pairs-of-shoes.parquet").read_bytes() == before
    assert "prompts.txt is there already and is a file" in refused("import", "pickapic", "shoes", "--out", "prompts.txt")
    works("import", "pickapic", "shoes")
    for folder in ("prompts.txt/out", "/proc/out"):
        assert f"{folder} cannot be made" in refused("export-pairs", "csv", folder, "--from", "pairs/shoes")
    (place / "bad").mkdir()
    (place / "bad" / "metadata.jsonl").write_text("{")
    assert "every one of them: " in (sentence := refused("import", "invoke", "bad", "--out", "gone")) and ".gone.tmp/dropped.jsonl" in sentence


def test_a_rounds_pairs_go_out_in_other_programs_formats(finished):
    works("export-pairs", "pickapic", "out", "--round", "1")
    table = pq.read_table("out/data/train-00000.parquet")
    pairs = pq.read_table(sorted(folder_of(finished / "runs" / "t", 1, "pair").glob("parts/pairs-*.parquet"))[0])
    assert len(table) == len(pairs) and fdpo("export-pairs", "pickapic", "out").code == 1
