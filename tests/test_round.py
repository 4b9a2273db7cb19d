"""Runs as wholes: what depends on what, what must not matter, what finetuning reads, and what others can open."""

import json
import math
import re
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from datasets import load_dataset
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from whole_runs import folder_of, manifests, refused, results, sealed_anew, session, table, works

from fashiondpo_pipeline import config, diagnosis, testing
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.generators.diffusers_model import DiffusersModel
from stages import finetune

# -- what depends on what: one line a knob. Names of steps are those of folders, with the round before.

HELD_OUT = r"\d (held-out-.*|evaluate)"
SHOWN = rf"0 encode|{HELD_OUT}"
EVALUATE = r"\d evaluate"
PREFERRED = r"1 (pair|finetune|held-out-.*|evaluate)|2 .*"  # pairs of round 1 and all that follows
TRAINED = PREFERRED.replace("pair|", "")
PICTURES = r"\d (?!encode).*"  # everything but the prompts' encodings
CANDIDATES = r"[12] .*"  # everything but the base's held-out pictures
DRAWN = rf"0 encode|{CANDIDATES}"
EVERYTHING = r"\d .*"
NOTHING = r"(?!)"
REFUSED = ""

KNOBS = {
    "name=other": NOTHING,
    "seed=8": PICTURES,
    "rounds=9": NOTHING,
    "generator.use=fashiondpo_pipeline.generators.text2img:text2img": EVERYTHING,
    "generator.model={other_model}": PICTURES,
    "generator.revision=abc": REFUSED,  # a folder is what its files are
    "generator.variant=fp16": EVERYTHING,
    "generator.dtype=float16": EVERYTHING,
    "generator.prediction=epsilon": NOTHING,  # a check, not a choice
    "generator.config=elsewhere": REFUSED,  # of a single file, which this model is not
    "generator.lora=style.safetensors": PICTURES,
    "generator.lora_scale=0.5": NOTHING,  # without a LoRA
    "prompts.file=more.txt": DRAWN,  # one training prompt more
    "prompts.file=more_held_out.txt": SHOWN,
    "prompts.held_out=0.8": EVERYTHING,
    "prompts.most_train=3": DRAWN,
    "prompts.most_held_out=3": SHOWN,
    "sample.candidates=5": CANDIDATES,
    "sample.prompts=2": CANDIDATES,
    "sample.prompts=1000": NOTHING,  # all there are, as ever
    "sample.steps=5": PICTURES,
    "sample.guidance=2.0": PICTURES,
    "sample.guidance_interval=[0.2, 0.8]": PICTURES,
    "sample.guidance_rescale=0.7": PICTURES,
    "sample.eta=0.5": PICTURES,
    "sample.negative=blurred": EVERYTHING,
    "sample.height=32": PICTURES,
    "sample.width=32": PICTURES,
    "sample.save=2": CANDIDATES,
    "sample.path=false": CANDIDATES,
    "sample.predictions=true": CANDIDATES,
    "sample.tile=4": PICTURES,
    "experts.mood.options.moods={red: 0.5}": rf"\d (held-out-)?score-mood|{PREFERRED}",
    "experts.bright.use=whole_runs:Mood": rf"\d (held-out-)?score-bright(-disturbed)?|{EVALUATE}",  # watched only
    "experts.another.use=fashiondpo_pipeline.testing:Brightness": rf"\d (held-out-)?score-another|{EVALUATE}",
    "experts.clip_t.options.model=local-dir:{other_clip}": rf"\d (held-out-)?(score-clip_t|embed-.*)|{PREFERRED}",
    "score.repeat=0.5": NOTHING,  # none of these experts may answer otherwise
    "pair.weights={clip_t: 0.7, mood: 0.3}": PREFERRED,
    "pair.normalise=rank": PREFERRED,
    "pair.over=all": PREFERRED,
    "pair.saturate=0.8": PREFERRED,
    "pair.select=mirror": PREFERRED,
    "pair.margin=0.1": PREFERRED,
    "pair.margin_later=2": r"2 (pair|finetune|held-out-.*|evaluate)",
    "pair.agree=0.7": PREFERRED,
    "pair.per_group=3": PREFERRED,
    "pair.per_candidate=3": PREFERRED,
    "pair.labels=swapped": PREFERRED,
    "finetune.objective=diffusion_dpo": TRAINED,
    "finetune.options={label_smoothing: 0.1}": TRAINED,
    "finetune.signal=error": TRAINED,
    "finetune.beta=50": TRAINED,
    "finetune.auto_beta=0.3": TRAINED,
    "finetune.divergence=5": TRAINED,
    "finetune.reference=base": TRAINED,
    "finetune.reference_decay=0.5": TRAINED,
    "finetune.reference_mix=0.2": TRAINED,
    "finetune.guard=0.9": TRAINED,
    "finetune.replay=0.5": TRAINED,
    "finetune.guidance=none": TRAINED,
    "finetune.condition_dropout=0.1": TRAINED,
    "finetune.noise=fresh": TRAINED,
    "finetune.draws=9": TRAINED,
    "finetune.min_snr=5": TRAINED,
    "finetune.ratio_clip=0.1": TRAINED,
    "finetune.step_weight=density": TRAINED,
    "finetune.epochs=3": TRAINED,
    "finetune.groups=2": TRAINED,
    "finetune.window=[0, 1]": TRAINED,
    "finetune.timesteps=3": TRAINED,
    "finetune.pick=accuracy": TRAINED,
    "finetune.micro_batch=9": TRAINED,
    "finetune.checkpointing=true": TRAINED,
    "finetune.learning_rate=1e-4": TRAINED,
    "finetune.rate_later=0.5": r"2 (finetune|held-out-.*|evaluate)",
    "finetune.kept_later=0.5": r"2 (finetune|held-out-.*|evaluate)",
    "finetune.warmup=2": TRAINED,
    "finetune.decay=none": TRAINED,
    "finetune.weight_decay=0": TRAINED,
    "finetune.max_grad_norm=2": TRAINED,
    "finetune.adapter=dora": TRAINED,
    "finetune.rank=4": TRAINED,
    "finetune.alpha=4": TRAINED,
    "finetune.targets=[to_q]": TRAINED,
    "finetune.precision=bf16": TRAINED,
    "finetune.strength=2.0": r"1 (strength|held-out-.*|evaluate)|2 .*",
    "finetune.strength=auto": r"1 (strength.*|held-out-.*|evaluate)|2 .*",
    "finetune.strengths=[2.0]": NOTHING,  # without auto, as the others
    "finetune.strength_prompts=8": NOTHING,
    "finetune.strength_pictures=8": NOTHING,
    "finetune.strength_floor=null": NOTHING,
    "finetune.negative=true": r"\d negative",
    "finetune.checkpoint_every=5": NOTHING,
    "evaluate.pictures=3": HELD_OUT,
    "evaluate.steps=5": HELD_OUT,
    "evaluate.guidance=2.0": HELD_OUT,
    "evaluate.eta=0.5": HELD_OUT,
    "evaluate.judge=clip_t": rf"0 held-out-(score|embed)-.*-disturbed|{EVALUATE}",  # whose noise is another
    "evaluate.grid=[{steps: 2}]": rf"\d held-out-.*-steps-2|{EVALUATE}",
    "evaluate.grid_pictures=3": NOTHING,  # without such settings
    "evaluate.drift=2": NOTHING,
    "evaluate.keep=best": r"2 .*",  # what round 2 starts from is then known once round 1 is evaluated
    "evaluate.bootstrap=500": EVALUATE,
    "evaluate.interval=0.9": EVALUATE,
    "report.prompts=1": NOTHING,
    "report.pictures=1": NOTHING,
    "report.pairs=1": NOTHING,
    "machine.device=cuda": NOTHING,
    "machine.batch=1": NOTHING,
    "machine.shard=1": NOTHING,
    "machine.threads=2": NOTHING,
    "machine.compile=true": NOTHING,
    "by_round={2: {finetune: {epochs: 3}}}": r"2 (finetune|held-out-.*|evaluate)",
    "by_round={2: {pair: {margin: 0.1}}}": r"2 (pair|finetune|held-out-.*|evaluate)",
    "by_round={2: {sample: {eta: 0.5}}}": r"2 .*",
    "by_round={1: {finetune: {epochs: 3}}, 3: {pair: {margin: 0.1}}}": TRAINED,
    "by_round={2: {finetune: {checkpoint_every: 3}}}": REFUSED,
}
MOOD = "experts.mood.use=whole_runs:Mood"
WEIGHTS = "pair.weights={clip_t: 0.5, mood: 0.5}"


def claims(*sets: str) -> dict[str, str]:
    """"round name" -> fingerprint of every step of two rounds."""
    chain = session(MOOD, WEIGHTS, *sets).chain(2)
    return {f"{step.round} {step.name}": step.fingerprint for step in chain.steps}


@pytest.fixture(scope="module")
def others(tmp_path_factory, tiny_sd_v) -> dict[str, str]:
    """Other models than the configuration's."""
    other_clip = testing.tiny_clip(tmp_path_factory.mktemp("models") / "clip", seed=9)
    return {"{other_model}": str(tiny_sd_v), "{other_clip}": str(other_clip)}


@pytest.mark.parametrize("knob", KNOBS)
def test_one_knob_re_runs_what_depends_on_it_and_nothing_else(place, others, knob):
    prompts = (place / "prompts.txt").read_text()
    (place / "more.txt").write_text(prompts + "\na black coat")
    (place / "more_held_out.txt").write_text(prompts + "\na pink coat")
    attention = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    save_file({f"{attention}.lora_{side}.weight": torch.ones(shape) for side, shape in (("A", (2, 8)), ("B", (8, 2)))}, place / "style.safetensors")
    change = knob
    for name, path in others.items():
        change = change.replace(name, path)
    before = claims()
    if KNOBS[knob] == REFUSED:
        with pytest.raises(UserError, match=change.partition("=")[0]):
            claims(change)
        return
    after = claims(change)
    assert {name for name in before if not name.endswith("-disturbed")} <= set(after)
    assert {name for name in after if after[name] != before.get(name)} == {n for n in after if re.fullmatch(KNOBS[knob], n)}


def test_every_knob_has_its_line_in_that_table():
    sections = config.Config.model_fields.items()
    knobs = [f"{name}.{knob}" if knob else name for name, field in sections if name != "experts"
             for knob in getattr(field.annotation, "model_fields", [""])]
    assert {knob.partition("=")[0] for knob in KNOBS if not knob.startswith("experts.")} == set(knobs)


def test_an_expert_that_goes_changes_nothing_but_what_it_took_part_in(place):
    before = claims()
    with_one = claims("experts.another.use=fashiondpo_pipeline.testing:Brightness")
    assert {name for name in before if with_one[name] != before[name]} == {"1 evaluate", "2 evaluate"}


def test_the_old_setting_finds_the_old_results(finished):
    steps = manifests(finished / "runs/t")
    works("round", "--n", "1", "--set", "pair.margin=0.1")
    made = ("pair", "finetune", "held-out-sample", "held-out-embed", "held-out-score", "held-out-score", "evaluate")
    assert len(manifests(finished / "runs/t")) == len(steps) + len(made)
    assert works("round").err.startswith("runs/t has 3 rounds already: nothing to do\n")
    assert manifests(finished / "runs/t").items() >= steps.items()
    assert "7 results of other settings" in works("status").err


# -- what must not matter


def test_a_run_that_is_there_does_nothing_and_says_so(finished, finished_place):
    told = works("round")
    assert told.err.startswith("runs/t has 3 rounds already: nothing to do\n")
    kept = re.search(r"^(?:(The base)|Round (\d)) is the one to keep", told.err, re.MULTILINE)
    assert kept and told.err.splitlines()[-1].endswith(f"--round {kept[2] or 0}"), "what is offered is what is to be kept"
    assert re.search(r"^warning  only 6 held-out prompts: ", told.err, re.MULTILINE)
    assert manifests(finished / "runs/t") == manifests(finished_place / "runs/t")
    assert results(finished / "runs/t") == results(finished_place / "runs/t")


def test_two_rounds_and_then_a_third_are_three_rounds(place, finished_place):
    works("round", "--n", "2")
    assert json.loads((place / "runs/t/numbers.json").read_text()).keys() == {"round 1", "round 2"}
    assert "steps are done, going on with round 3 sample" in works("round", "--n", "3").err
    assert results(place / "runs/t") == results(finished_place / "runs/t")


def test_each_stage_alone_makes_what_a_round_makes(place, finished_place):
    for stage in ("sample", "score", "pair", "finetune", "evaluate"):
        told = works(stage, "--round", "1")
        *_, done, follows = told.err.splitlines()
        assert done.startswith("round 1") and follows.startswith("next: fdpo ")
        assert works(stage, "--round", "1").err == f"round 1 {stage}: done already, nothing to do\n{follows}\n"
    works("report")
    whole = results(finished_place / "runs/t")
    made = results(place / "runs/t")
    assert json.loads(made.pop("numbers.json"))["round 1"] == json.loads(whole["numbers.json"])["round 1"]
    assert made.items() <= whole.items()


@pytest.mark.parametrize("machine", [("machine.batch=1", "machine.shard=100"), ("machine.batch=13", "machine.shard=1")])
def test_how_much_is_done_at_once_changes_nothing(place, finished_place, machine):
    works("round", "--n", "2", "--set", machine[0], "--set", machine[1])
    ours, theirs = place / "runs/t", finished_place / "runs/t"
    steps = manifests(ours)
    assert steps.keys() <= manifests(theirs).keys()
    for step in steps:
        names = {path.stem.rpartition("-")[0] for path in (theirs / step).glob("parts/*.parquet")}
        for name in names:
            assert table(ours / step, name).equals(table(theirs / step, name)), f"{name} of {step}"
        assert [path.read_bytes() for path in (ours / step).glob("adapter/*")] == [
            path.read_bytes() for path in (theirs / step).glob("adapter/*")]


# -- labels


def labelled(place, labels: str) -> pa.Table:
    folder = place / "runs/t" / session(f"pair.labels={labels}").chain(1).rounds[1].pair.folder
    shutil.rmtree(folder, ignore_errors=True)
    works("pair", "--round", "1", "--set", f"pair.labels={labels}")
    return table(folder, "pairs")


def test_swapped_labels_are_the_same_pairs_the_other_way_round(finished):
    pairs, swapped = labelled(finished, "scored"), labelled(finished, "swapped")
    assert len(pairs) > 10
    assert swapped["group"].equals(pairs["group"])
    for one, other in (("winner", "loser"), ("winner_score", "loser_score")):
        assert swapped[one].equals(pairs[other])
        assert swapped[other].equals(pairs[one])
    for name in ("margin", "gap_clip_t"):
        assert np.array_equal(swapped[name].to_numpy(), -pairs[name].to_numpy())


def test_random_labels_are_a_coin_that_falls_the_same_way_each_time(finished):
    pairs, coin = labelled(finished, "scored"), labelled(finished, "random")
    swapped = coin["margin"].to_numpy() < 0
    assert 0.2 < swapped.mean() < 0.8
    assert np.array_equal(coin["winner"].to_numpy(), np.where(swapped, pairs["loser"], pairs["winner"]))
    assert np.array_equal(np.abs(coin["margin"].to_numpy()), pairs["margin"].to_numpy())
    assert labelled(finished, "random").equals(coin)


# -- the cached reference

OBJECTIVES = {
    "step_dpo": (),
    "diffusion_dpo, tracked": ("finetune.objective=diffusion_dpo",),
    "diffusion_dpo, tracked, min-SNR": ("finetune.objective=diffusion_dpo", "finetune.min_snr=5"),
    "diffusion_dpo, fresh": ("finetune.objective=diffusion_dpo", "finetune.noise=fresh"),
    "step_dpo, guided": ("sample.guidance=3.0",),
    "step_dpo, by density": ("finetune.step_weight=density",),
    "step_dpo, a few steps": ("sample.save=2", "finetune.window=[0, 1]"),
}


@pytest.fixture
def forwards(monkeypatch) -> list[list[bool]]:
    """For each round's finetuning, whether each call of the denoiser was with gradient, in order."""
    rounds, training = [], []
    denoise, run = DiffusersModel.denoise, finetune.run

    def counted(self, x_t, t, parts):
        if training:
            rounds[-1].append(torch.is_grad_enabled())
        return denoise(self, x_t, t, parts)

    def ran(*args):
        training.append(True)
        rounds.append([])
        run(*args)
        training.clear()

    monkeypatch.setattr(DiffusersModel, "denoise", counted)
    monkeypatch.setattr(finetune, "run", ran)
    return rounds


def train(number: int, *sets: str):
    """A session whose rounds are made up to finetuning, nothing held out."""
    made = session(*sets)
    chain = made.chain(number)
    for r in chain.rounds[1:]:
        made.execute([chain.encode, r.sample, *r.embeddings.values(), *r.scores.values(), r.pair, r.finetune])
    return made


@pytest.mark.parametrize("sets", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_policy_starts_as_its_own_reference_with_loss_log_two(place, forwards, sets):
    made = train(1, *sets)
    out = made.output(made.chain(1).rounds[1].finetune)
    assert out.manifest["numbers"]["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    steps = out.table("steps").to_pylist()
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-3)
    assert steps[-1]["margin"] != 0
    asked = forwards[0].count(False)
    assert bool(asked) == any("fresh" in knob for knob in sets), "only fresh noise needs the reference once, before training"
    assert all(forwards[0][asked:]), "no reference forward while training"


def test_each_round_starts_with_loss_log_two_and_no_reference_forward(finished):
    for number in (1, 2, 3):
        (manifest,) = (finished / "runs/t").glob(f"round-0{number}/finetune-*/manifest.json")
        numbers = json.loads(manifest.read_text())["numbers"]
        assert numbers["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
        assert numbers["reference_rows_before"] == numbers["reference_rows_in_training"] == 0


@pytest.mark.parametrize("sets", [OBJECTIVES[name] for name in ("step_dpo", "diffusion_dpo, tracked", "diffusion_dpo, fresh")])
def test_the_base_as_reference_is_asked_once_before_training_and_answers_for_itself(place, forwards, monkeypatch, sets):
    asked = []

    class Kept(finetune.Reference):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            asked.append(self)

    monkeypatch.setattr(finetune, "Reference", Kept)
    made = train(2, "finetune.reference=base", *sets)
    calls, store, cached = forwards[1], asked[1].store, asked[1].numbers
    assert not any(calls[: calls.count(False)]), "first the reference, and then never again"
    places = [(row, column) for row in range(len(store.names)) for column in range(store.columns)]
    numbers = made.output(made.chain(2).rounds[2].finetune).manifest["numbers"]
    assert numbers["reference_rows_before"] == len(places)
    assert numbers["reference"] == {"kind": "base", "hash": asked[1].hash}
    made.generator(None)
    with torch.inference_mode():
        for some in np.array_split(np.array(places), len(places) // 8):
            rows, columns = some.T
            live = store.signals_of(rows, columns, store.spot(rows, columns), store.predict(rows, columns))
            for name, values in cached.items():
                assert values[rows, columns] == pytest.approx(live[name].numpy(), rel=1e-4, abs=1e-6)
    assert numbers["first_loss"] != pytest.approx(math.log(2), abs=1e-5), "in round 2 the policy is no longer the base"


def test_a_spoilt_cache_is_noticed_at_step_0(place):
    made = session()
    chain = made.chain(1)
    r = chain.rounds[1]
    made.execute([chain.encode, r.sample, *r.embeddings.values(), *r.scores.values(), r.pair])
    sample = made.output(r.sample)
    for shard in sample.shards("trajectories"):
        parts = {name: sample.table(name, shard=shard) for name in ("candidates", "trajectories")}
        paths = parts["trajectories"]
        wrong = [[value + 256 * (i % 2) for value in row] for i, row in enumerate(paths["log_prob"].to_pylist())]
        column = paths.column_names.index("log_prob")
        parts["trajectories"] = paths.set_column(column, paths.schema.field(column), pa.array(wrong, pa.list_(pa.float64())))
        sample.write(shard, **parts)
    sealed_anew(sample.folder)
    told = refused("finetune", "--round", "1", "--set", "finetune.step_weight=density")
    assert re.fullmatch(
        r"round 1 finetune: at step 0 the policy is its own reference, yet a margin is 100 instead of 0, as "
        r"predictions differ by [\d.e+]+ times "
        r"the most that rounding \(float32\) gives: these candidates were drawn by another model, or with "
        r"other prompts, guidance, dtype, precision "
        r"or device than finetune uses; draw and finetune with the same settings, libraries and device "
        r"\(another --name or seed draws anew\)", told)


def test_a_picture_that_broke_takes_no_part_and_does_not_stop_the_others(place, monkeypatch):
    denoise = DiffusersModel.denoise

    def spoilt(self, x_t, t, parts):
        found = denoise(self, x_t, t, parts)
        return torch.where((x_t.flatten(1)[:, :1] > 2.2)[..., None, None], torch.nan, found)

    monkeypatch.setattr(DiffusersModel, "denoise", spoilt)
    told = works("round", "--n", "1")
    faults = table(folder_of(place / "runs/t", 1, "sample"), "candidates").filter(pc.field("fault").is_valid())
    assert 0 < len(faults) < 12
    assert set(faults["fault"].to_pylist()) == {"the latent is not finite"}
    assert f"round 1: {len(faults)} of 24 pictures are broken and take no part (the latent is not finite)" in told.err
    pairs = table(folder_of(place / "runs/t", 1, "pair"), "pairs").to_pylist()
    used = {(pair["group"], pair[role]) for pair in pairs for role in ("winner", "loser")}
    assert not used & {(row["group"], row["candidate"]) for row in faults.to_pylist()}


# -- what others can open


def test_tables_open_in_pandas_duckdb_and_datasets(finished_place, tmp_path):
    run = finished_place / "runs/t"
    files = sorted(map(str, folder_of(run, 1, "sample").glob("parts/candidates-*.parquet")))
    frame = pd.concat(map(pd.read_parquet, files))
    assert len(frame) == 24
    assert frame.groupby("group").size().eq(4).all()

    pairs = str(folder_of(run, 1, "pair") / "parts/pairs-*.parquet")
    query = """select p."group", w.seed from read_parquet(?) p
               join read_parquet(?) w on p."group" = w."group" and p.winner = w.candidate"""
    found = duckdb.execute(query, [pairs, files]).fetchall()
    assert len(found) == len(table(folder_of(run, 1, "pair"), "pairs"))

    dataset = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))
    picture = dataset[5]["picture"]
    assert isinstance(picture, Image.Image)
    assert picture.size == (16, 16)
    assert dataset[5]["prompt"] == frame.iloc[5]["prompt"]
    assert len(load_dataset("parquet", data_files=pairs, split="train", cache_dir=str(tmp_path))) == len(found)


@pytest.mark.parametrize(("number", "guidance", "eta"), [(2, 1.0, 1.0), (3, 4.0, 0.0)])
def test_the_exported_lora_gives_in_stock_diffusers_what_generate_gives(finished, tiny_sd, number, guidance, eta):
    exported = works("export", "lora", "--round", str(number))
    assert exported.out == "lora/pytorch_lora_weights.safetensors\n"
    told = works("generate", "a red dress", "--round", str(number), "--count", "3", "--seed", "11", "--guidance", str(guidance),
                 "--eta", str(eta), "--out", "ours")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None, requires_safety_checker=False)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(11 + i) for i in range(3)]
    options = {"num_inference_steps": 4, "guidance_scale": guidance, "eta": eta, "output_type": "np"}
    pipe.load_lora_weights("lora")
    stock = pipe(["a red dress"] * 3, generator=seeds, **options).images
    files = told.out.split()
    assert len(files) == 3
    for file, wanted in zip(files, stock, strict=True):
        ours = np.asarray(Image.open(file)).astype(float)
        assert np.abs(ours - wanted * 255).max() <= 2
    pipe.unload_lora_weights()
    base = pipe(["a red dress"] * 3, generator=[s.manual_seed(11 + i) for i, s in enumerate(seeds)], **options).images
    assert np.abs(base - stock).max() > 0.5 / 255, "the LoRA should change something, or this test shows nothing"


def test_the_lineage_of_an_export_says_where_it_comes_from(finished):
    works("export", "lora", "--round", "2")
    lineage = json.loads((finished / "lora/lineage.json").read_text())
    made = session()
    assert lineage["round"] == 2
    assert lineage["base_hash"] == made.generator_identity
    assert lineage["finetune"] == made.chain(2).rounds[2].finetune.claim


# -- rolling back


BEST = ("--set", "evaluate.keep=best", "--set", "prompts.most_train=4", "--set", "prompts.most_held_out=2")


def test_a_round_that_goes_on_from_the_best_one_says_which_it_is_compared_with(place, monkeypatch):
    """Round 1 stays the best: round 3 goes on from it, and neither words nor report speak of round 2 there."""
    monkeypatch.setattr(diagnosis, "best_round", lambda rounds, *_: min(rounds, default=0))
    told = works("round", *BEST)
    said = (told.out + told.err).split("round 3  sample")
    assert ", to round 1 in " in said[0].split("round 2  sample")[1] and ", to round 1 in " in said[1] and "to round 2 in" not in said[1]
    numbers = json.loads((place / "runs/t/numbers.json").read_text())
    assert [numbers[f"round {n}"]["before"] for n in (1, 2, 3)] == [0, 1, 1]
    own = session(*BEST[1::2]).chain(3).rounds
    assert own[3].finetune.inputs["adapter"] is own[1].finetune and own[3].evaluate.inputs["before"] is own[1].held_out
    page = (place / "runs/t/report.html").read_text()
    assert "<dt>over round 1</dt>" in page and page.count("(round 1)</td>") == 1 and "over round 2" not in page
    assert f"adapter  {Path('runs/t') / own[1].finetune.folder / 'adapter'}" in said[1]
    assert "next: fdpo generate \"a red dress\" --round 1 --set" in said[1]


def test_where_the_base_is_kept_no_adapter_is_named(place):
    """No drift is so small: every round raises an alarm, so that each goes on from the base and none is kept."""
    sets = (*BEST, "--set", "evaluate.drift=1e-9", "--set", "rounds=2")
    told = works("round", *sets)
    said = told.out + told.err
    assert "The base is the one to keep" in said and "adapter  none, as the base is kept" in said and "to round 1 in" not in said
    assert "next: fdpo generate \"a red dress\" --round 0 --set" in said
    assert "-round0-" in works("generate", "a red dress", "--count", "1", "--round", "0", *sets).out
    assert "over round 1" not in (place / "runs/t/report.html").read_text()
