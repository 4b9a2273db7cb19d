"""Every mistake gets its own sentence: what, where, what to do. They are quoted here word for word."""

import json
import math
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from whole_runs import fdpo, folder_of, refused, sealed_anew, session, table, works

MOOD = ("--set", "experts.mood.use=whole_runs:Mood")


def cheap(*sets: str) -> tuple[str, ...]:
    """Arguments for one round."""
    return ("round", "--n", "1", *(word for text in sets for word in ("--set", text)))


# -- a device that there is not


@pytest.mark.parametrize(("wanted", "gpus", "told"), [
    ("cuda", 0, "is cuda, but torch finds no GPU: use auto or cpu"), ("cuda:1", 0, "is cuda:1, but torch finds no GPU: use auto or cpu"),
    ("cuda:2", 2, "is cuda:2, but torch finds 2, which count from 0: use cuda:1, or auto"),
    ("mps", 0, "is mps, but torch finds no GPU of Apple's: use auto or cpu"),
])
def test_a_device_that_there_is_not_is_one_sentence(place, monkeypatch, wanted, gpus, told):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    for command in ("sample", "round"):
        assert refused(command, "--set", f"machine.device={wanted}") == f"machine.device {told}"
    assert refused("expert", "train", "compatibility", "--out", "new", "--device", wanted) == f"--device {told}"


def test_what_is_no_device_is_told(place):
    assert refused("expert", "train", "compatibility", "--device", "gpu").startswith("--device is 'gpu', which is no device: use auto, cpu")


# -- the configuration


@pytest.mark.parametrize(
    ("knob", "sentence"),
    [
        ("finetune.bta=5", "finetune.bta: unknown key; did you mean 'beta'?"),
        ("sample.steps=ten", "sample.steps: should be a whole number, not 'ten'"),
        ("pair.weights={clip: 1}", "pair.weights: no expert called 'clip'; did you mean 'clip_t'?"),
        ("evaluate.judge=jury", "evaluate.judge: no expert called 'jury'; known: bright, clip_t"),
    ],
)
def test_a_knob_that_does_not_fit_is_named_with_what_would(place, knob, sentence):
    assert refused("plan", "--set", knob) == f"pipeline.yaml: this does not fit\n  {sentence}"


def test_a_configuration_that_is_not_there(place):
    assert refused("plan", "-c", "no.yaml") == "there is no no.yaml: `fdpo init` writes one, --config names another"


def test_one_candidate_gives_no_preference(place):
    assert refused(*cheap("sample.candidates=1")) == (
        "sample.candidates is 1: a preference needs at least 2 candidates a prompt; raise it")


def test_steps_to_save_that_there_are_not(place):
    assert refused(*cheap("sample.save=9")) == "sample.save: 9 steps cannot be kept of 4; lower it or raise sample.steps"
    assert refused(*cheap("sample.save=[1, 7]")) == "sample.save: [7] is not within the steps 0..3"


def test_a_window_without_a_saved_step_is_refused_before_sampling(place):
    assert refused(*cheap("sample.save=[0, 3]")) == (
        "finetune.window [0.1, 0.7] holds none of the saved steps [0, 3] of 4: widen it, or save others")
    assert not list((place / "runs/t").glob("round-*"))


def test_an_objective_that_needs_what_the_sampler_will_not_give_is_refused_before_sampling(place):
    assert refused(*cheap("sample.eta=0")) == (
        "finetune.objective step_dpo needs log-probabilities, which sample.eta 0 does not give: raise sample.eta, "
        "use diffusion_dpo, or set finetune.signal to error")
    assert not list((place / "runs/t").glob("round-*"))
    works("sample", "--round", "1", "--set", "sample.eta=0")
    works("score", "--round", "1", "--set", "sample.eta=0")
    works("pair", "--round", "1", "--set", "sample.eta=0")
    assert refused("finetune", "--round", "1", "--set", "sample.eta=0").startswith("finetune.objective step_dpo needs log-prob")
    works("finetune", "--round", "1", "--set", "sample.eta=0", "--set", "finetune.objective=diffusion_dpo")


def test_an_unknown_objective_generator_or_expert(place):
    assert refused(*cheap("finetune.objective=step_dp")) == "no objective called 'step_dp'; did you mean 'step_dpo'?"
    assert refused(*cheap("generator.use=text2image")) == "no generator called 'text2image'; did you mean 'text2img'?"
    assert refused(*cheap("experts.mood.use=clip")) == "no expert called 'clip'; did you mean 'clip_text'?"
    assert refused(*cheap("experts.mood.use=nowhere:Mood")) == (
        "the expert 'nowhere:Mood' cannot be imported (No module named 'nowhere'): install the package it lives in, or go to its folder")
    assert refused(*cheap("experts.mood.use=whole_runs:Moot")) == "the expert 'whole_runs:Moot': whole_runs has no 'Moot'"


@pytest.mark.parametrize(("sets", "sentence"), [
    (("finetune.objective=cdpo", "finetune.options={label_smoothing: 0.7}"),
     "finetune: the objective's option label_smoothing should be from 0 to below 0.5, not 0.7; change it in the configuration"),
    (("finetune.objective=cdpo", "finetune.options={label_smoothing: x}"), "finetune.options.label_smoothing: should be a number, not 'x'"),
    (("finetune.objective=json:loads",), "the objective 'json:loads' names Python's own module json, which holds none: name a class of yours"),
    (("finetune.objective=whole_runs:fdpo",),
     "the objective 'whole_runs:fdpo' is none: it is a function, not an objectives.Objective"),
    (("finetune.reference=mix", "finetune.adapter=dora"),
     "pipeline.yaml: this does not fit\n  finetune: reference mix needs a plain LoRA (adapter: lora or rslora), as the change that dora makes "
     "cannot be divided; set one or the other"),
    (("generator.use=whole_runs:Mood",), "the generator 'whole_runs:Mood' is none: the class Mood has no schedule, condition, denoise, decode"),
])
def test_an_objective_or_generator_that_could_not_work_is_refused_by_plan_and_before_sampling(place, sets, sentence):
    assert refused(*cheap(*sets)) == refused("plan", *(word for knob in sets for word in ("--set", knob))) == sentence
    assert not list((place / "runs/t").glob("round-*"))


class Half:
    """What takes other options than a generator's, and has half of its methods."""

    def __init__(self, model: str):
        pass

    schedule = condition = denoise = decode = None


class Whole(Half):
    """The same, with a generator's options."""

    def __init__(self, model: str, **options):
        pass


def test_a_generator_that_is_none_is_told_from_one(place):
    assert refused(*cheap("generator.use=test_bad_input:Half")).startswith(
        "generator.use: test_bad_input:Half cannot be called with a model and the options")
    assert refused(*cheap("generator.use=test_bad_input:Whole")) == (
        "generator.use: what test_bad_input:Whole makes is a Whole, not a generator: it has no schedule, remember, condition, denoise, "
        "decode, load, let_go, save_adapter")


def test_another_lora_shape_between_rounds(finished):
    assert refused("finetune", "--round", "2", "--set", "finetune.rank=4") == (
        lacking("finetune", "sample", "sample", "sample", 2, options=" --set finetune.rank=4"))
    (adapter,) = (finished / "runs/t").glob("round-01/finetune-*/adapter/*.safetensors")
    lora_of_rank_4 = session("finetune.rank=4")
    chain = lora_of_rank_4.chain(1)
    lora_of_rank_4.execute(chain.of(1)[:6])
    (other,) = (finished / "runs/t" / chain.rounds[1].finetune.folder / "adapter").iterdir()
    adapter.write_bytes(other.read_bytes())
    sealed_anew(adapter.parent.parent)
    (manifest,) = (finished / "runs/t").glob("round-02/finetune-*/manifest.json")
    manifest.unlink()
    assert refused("round", "--n", "2") == (
        "finetune.rank, alpha or targets changed between rounds: the last adapter has rank 4, alpha 4, targets "
        "['to_k', 'to_out.0', 'to_q', 'to_v']; keep them for all rounds of a run")


# -- the model


def test_a_model_folder_that_is_not_there(place):
    assert refused("plan", "--set", "generator.model=./models/sd") == (
        "generator.model: there is nothing at models/sd; check the path (relative ones start in the working folder)")
    assert refused("plan", "--set", "generator.model=/no/such/sd") == (
        "generator.model: there is nothing at /no/such/sd; check the path (relative ones start in the working folder)")
    (place / "empty").mkdir()
    assert refused(*cheap("generator.model=empty")) == (
        "generator.model: empty is not a diffusers folder (no model_index.json); name one that is")


def test_a_hub_id_that_cannot_be_reached(place):
    told = refused(*cheap("generator.model=nobody/nothing"))
    assert re.fullmatch(
        r"generator\.model: 'nobody/nothing' cannot be loaded \(.*\); it must be a diffusers folder, a single-file checkpoint, or a hub id "
        r"that can be reached \(offline: run `hf download ID` where there is a network, copy the folder here and name it; or copy the hub's "
        r"cache and set HF_HOME\)", told)


def test_a_model_that_predicts_something_else(place, tiny_sd, tiny_sd_v):
    assert refused(*cheap("generator.prediction=v_prediction")) == (
        f"generator.prediction is 'v_prediction', but the scheduler of {tiny_sd} says 'epsilon': "
        "set generator.prediction to auto, or correct the model's scheduler_config.json")
    works("sample", "--round", "1", "--set", f"generator.model={tiny_sd_v}", "--set", "generator.prediction=v_prediction")


def test_a_size_the_model_cannot_draw(place, tiny_sd):
    assert refused(*cheap("sample.height=17")) == (
        f"sample.height and sample.width must be multiples of 2 for {tiny_sd}, not 17x16")


def test_lora_targets_that_fit_nothing(place):
    told = refused(*cheap("finetune.targets=[to_x]"))
    assert told.startswith("finetune.targets: ['to_x'] fit no module of the denoiser (")


# -- prompts


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.txt", b"a red dress\na caf\xe9-coloured hat\n", "p.txt, line 2: not UTF-8 (byte 17); save the file as UTF-8"),
        ("p.txt", b"\n \n", "p.txt: there is no prompt in it; write one a line"),
        ("p.txt", b"a hat\na hat\n", "p.txt, line 2: 'a-hat-792c65' was given in line 1; take one of them out"),
        ("p.csv", b"text\na hat\n", "p.csv: no column 'prompt' in its first line, only text; name the columns there"),
        ("p.csv", b"prompt,colour\n,red\n", "p.csv, line 2: the prompt is empty; fill it or take the line out"),
        ("p.jsonl", b'{"prompt": "a hat"}\n}\n', "p.jsonl, line 2: not JSON (Expecting value: line 1 column 1 (char 0))"),
        ("p.jsonl", b'["a hat"]\n', 'p.jsonl, line 1: expected an object such as {"prompt": "a red dress"}'),
        ("p.csv", b"prompt,split\na hat,test\n", "p.csv, line 2: split 'test' is not one of 'train', 'held-out'"),
        ("p.docx", b"a hat", "prompts.file: p.docx is none of .txt, .csv, .tsv, .jsonl, .parquet; save it as one of them"),
        ("p.txt", b"a black coat\na blue bag\n", "p.txt: no held-out prompts; add some, or change prompts.held_out"),
    ],
)
def test_a_prompt_file_that_does_not_fit_is_named_with_its_line(place, name, data, sentence):
    (place / name).write_bytes(data)
    assert refused("plan", "--set", f"prompts.file={name}") == sentence


def test_a_prompt_file_that_is_not_there(place):
    assert refused("plan", "--set", "prompts.file=no.txt") == (
        "prompts.file: there is no file no.txt; check the path (relative ones start in the working folder)")


def test_prompts_may_hold_missing_numbers_dates_and_pictures(place):
    rows = {"prompt": ["a hat", "a bag"], "split": ["train", "held-out"], "price": [1.5, math.nan],
            "since": pd.to_datetime(["2024-01-01", None]), "reference": [{"bytes": b"1", "path": "a"}, None]}
    pd.DataFrame(rows).to_parquet("p.parquet")
    before, again = (session("prompts.file=p.parquet").prompts["train"].identity for _ in range(2))
    assert before == again
    rows["reference"][0] = {"bytes": b"2", "path": "a"}
    pd.DataFrame(rows).to_parquet("p.parquet")
    assert before != session("prompts.file=p.parquet").prompts["train"].identity, "another picture is another prompt"


# -- experts


def test_an_option_that_an_expert_does_not_take(place):
    assert refused("plan", "--set", "experts.clip_t.options={modle: x}") == (
        "experts.clip_t.options.modle: unknown key; did you mean 'model'?\nexperts.clip_t.options.model: missing; add it")


def test_what_experts_need_and_the_prompts_lack_is_told_before_anything_runs(place):
    asked = (*MOOD, "--set", "experts.mood.options={needs: colour}")
    assert refused("round", *asked) == (
        "expert 'mood' needs the column 'colour', which the prompts do not have: add it, or drop the expert "
        "(--set experts.mood=null)")
    assert not (place / "runs").exists()


def test_a_clip_model_without_weights_or_folder(place):
    assert refused("plan", "--set", "experts.clip_t.options={model: ViT-B-32}") == (
        "CLIP model 'ViT-B-32': name its weights too (pretrained: laion2b_s34b_b79k), or a local-dir:PATH")
    assert refused("plan", "--set", "experts.clip_t.options={model: 'local-dir:nowhere'}") == (
        "CLIP model 'local-dir:nowhere': there is nothing at nowhere; check the path (relative ones start in the working "
        "folder)")


def scores(place, name: str = "mood") -> list[dict]:
    return table(folder_of(place / "runs/t", 1, f"score-{name}"), "scores").to_pylist()


def moody(moods: dict, *sets: str) -> tuple[str, ...]:
    moods = json.dumps(moods)
    return cheap("experts.mood.use=whole_runs:Mood", f"experts.mood.options.moods={moods}", "pair.weights={mood: 1}", *sets)


def test_an_expert_that_raises_for_some_gives_them_a_reason_and_the_run_goes_on(place):
    told = works(*moody({"blue-hat": "raise"}))
    group = next(row["group"] for row in scores(place) if "blue-hat" in row["group"])
    assert f"round 1: expert 'mood' gave no score for 4 of 24 (ValueError: I do not like {group})" in told.err
    for row in scores(place):
        assert math.isnan(row["score"]) == (row["group"] == group)
        assert row["reason"] == (f"ValueError: I do not like {group}" if row["group"] == group else None)
    rejects = table(folder_of(place / "runs/t", 1, "pair"), "rejects").to_pylist()
    assert {"group": group, "reason": "mood gave no score for 4 of 4"} in rejects


def test_an_expert_that_says_nan_for_some(place):
    told = works(*moody({"/2": "nan"}))
    assert "round 1: expert 'mood' gave no score for 6 of 24 (the expert answered nan)" in told.err
    pairs = table(folder_of(place / "runs/t", 1, "pair"), "pairs").to_pylist()
    assert pairs
    assert 2 not in {pair[role] for pair in pairs for role in ("winner", "loser")}


@pytest.mark.parametrize(("mood", "reason"), [("raise", "ValueError: I do not like a-.*"), ("nan", "the expert answered nan")])
def test_an_expert_that_is_silent_about_all_stops_the_run_and_is_asked_again_once_mended(place, monkeypatch, mood, reason):
    command = moody({"a-": mood})
    assert re.fullmatch(rf"round 0: expert 'mood' gave no score for any of 12 candidates \({reason}\): mend it and run the "
                        "same command again", refused(*command))
    monkeypatch.setattr("whole_runs.Mood._one", lambda self, row: float(np.asarray(row["picture"]).mean() / 255))
    assert "steps are done, going on with round 0 held-out-score-mood" in works(*command).err


def test_an_expert_may_be_silent_about_a_whole_shard(place):
    works(*moody({"blue-hat": "nan"}, "machine.shard=1"))
    assert sum(math.isnan(row["score"]) for row in scores(place)) == 4


def test_an_expert_that_gives_too_few_scores(place, monkeypatch):
    monkeypatch.setattr("whole_runs.Mood.__call__", lambda self, rows: [0.5])
    assert refused(*moody({})) == "Mood gave 1 scores for 4 pictures: one for each is the contract"


def test_a_full_disk_under_an_expert_is_not_an_opinion(place, monkeypatch):
    def full(self, rows):
        raise OSError(28, "No space left on device", "cache.bin")

    monkeypatch.setattr("whole_runs.Mood.__call__", full)
    assert refused(*moody({})) == (
        "the disk is full (cache.bin): what was finished is kept; make room and run the same command again")


def test_a_group_with_equal_scores_gives_no_pair_and_the_reason(place):
    works(*moody({"blue-hat": 0.5}))
    rejects = table(folder_of(place / "runs/t", 1, "pair"), "rejects").to_pylist()
    assert [(row["group"][:10], row["reason"]) for row in rejects] == [("a-blue-hat", "all scores are equal")]


def test_no_group_with_a_preference_is_an_error(place):
    assert refused(*moody({"a-": 0.5})) == (
        "round 1: no group gave a pair (all scores are equal, and so on): lower pair.margin or pair.agree, or look at the scores")


def test_a_margin_that_nothing_passes_is_an_error(place):
    told = refused(*cheap("pair.margin=9"))
    assert re.fullmatch(r"round 1: no group gave a pair \(widest gap \d\.\d+ is within the margin 9, and so on\): lower "
                        r"pair\.margin or pair\.agree, or look at the scores", told)


def spoil(step, made, place: tuple[int, int]) -> dict:
    """Cut a picture of a sample step short; its row."""
    out = made.output(step)
    shard, row = place
    parts = {name: out.table(name, shard=shard) for name in ("candidates", "trajectories") if out.shards(name)}
    rows = parts["candidates"].to_pylist()
    rows[row]["picture"]["bytes"] = rows[row]["picture"]["bytes"][:-30]
    out.write(shard, **{**parts, "candidates": pa.Table.from_pylist(rows, parts["candidates"].schema)})
    sealed_anew(out.folder)
    return rows[row]


def test_a_corrupt_picture_is_a_missing_score_with_a_reason_and_never_a_crash(place):
    made = session()
    chain = made.chain(1)
    base, r = chain.rounds
    made.execute([chain.encode, base.held_out, r.sample])
    spoil(base.held_out, made, (0, 1))
    bad = spoil(r.sample, made, (1, 2))
    name = f"{bad['group']}/{bad['candidate']}"
    told = works("round", "--n", "1")
    sentence = rf"{re.escape(name)}: the picture cannot be read \(.*\); re-make it or take the row out"
    assert re.search(rf"^round 1: {sentence}$", told.err, re.MULTILINE)
    assert re.search(rf"^round 1: expert 'bright' gave no score for 1 of 24 \({sentence}\)$", told.err, re.MULTILINE)
    for expert in ("clip_t", "bright"):
        (silent,) = [row for row in scores(place, expert) if math.isnan(row["score"])]
        assert (silent["group"], silent["candidate"]) == (bad["group"], bad["candidate"])
        assert "cannot be read" in silent["reason"]
    pairs = table(folder_of(place / "runs/t", 1, "pair"), "pairs").to_pylist()
    used = {(pair["group"], pair[role]) for pair in pairs for role in ("winner", "loser")}
    assert (bad["group"], bad["candidate"]) not in used
    numbers = json.loads((place / "runs/t/numbers.json").read_text())["round 1"]
    assert numbers["pictures"] == 12
    assert 0 <= numbers["against_base"]["win_rate"] <= 1
    assert numbers["diversity"]["base"] is not None
    assert "NaN" not in (place / "runs/t/numbers.json").read_text()


# -- commands at the wrong time


def test_what_needs_a_round_says_so_where_there_is_none(place):
    nothing = "runs/t: no round has been made with these settings; `fdpo status` shows what there is, `fdpo round` makes one"
    assert refused("generate", "a red dress") == nothing
    assert refused("export", "lora") == nothing
    assert refused("rescore", "--weights", "clip_t=1") == nothing
    assert refused("report") == nothing
    assert refused("status") == "there is no run at runs/t: `fdpo round` makes it, --name names another"
    assert refused("generate", "a red dress", "--round", "4") == (
        "round 4: finetune has not been run with these settings; `fdpo round` makes it")
    assert not (place / "lora").exists()


def lacking(stage: str, role: str, name: str, command: str, number: int = 1, of: int | None = None, options: str = "") -> str:
    of = of or number
    return (f"round {number} {stage} reads {role} of round {of} ({name}), which is not there with these settings: "
            f"`fdpo {command} --round {of}{options}` makes it, or `fdpo round`{' with the same options' if options else ''}")


def test_stages_out_of_order_name_the_command_that_comes_first(place):
    for stage in ("score", "pair", "finetune"):
        assert refused(stage, "--round", "1") == lacking(stage, "sample", "sample", "sample")
    assert refused("sample", "--round", "2") == lacking("sample", "adapter", "finetune", "finetune", 2, of=1)
    works("sample", "--round", "1")
    assert refused("pair", "--round", "1") == lacking("pair", "score-clip_t", "score-clip_t", "score")


def test_pairs_that_nobody_saved(finished):
    (there,) = (finished / "runs/t").glob("round-01/pair-*")
    sentence = f"round 1 has no pairs 12345678; there are: {there.name.removeprefix('pair-')}"
    for command in (["finetune"], ["export", "lora"], ["generate", "a red dress"]):
        assert refused(*command, "--round", "1", "--pairs", "12345678") == sentence


def test_an_empty_prompt_to_generate(finished):
    assert refused("generate", "  ") == "the prompt is empty: say what to draw"


def test_a_count_of_rounds_that_is_none_is_a_usage_error(place):
    told = fdpo("round", "--n", "0")
    assert told.code == 2
    assert "Invalid value for '--n'" in told.err


@pytest.mark.parametrize("knob", ["learning_rate", "alpha", "weight_decay"])
def test_a_number_too_large_to_train_with_is_told_at_the_step_that_it_breaks(finished, knob):
    told = refused("finetune", "--round", "1", "--set", f"finetune.{knob}=1.0e+9")
    assert told.startswith("round 1 finetune: the gradient is not finite at step 1: lower finetune.learning_rate")
