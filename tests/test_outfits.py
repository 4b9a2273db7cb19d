"""Outfits and users of the embedded default follow their stated rule; the experts on them learn it, and keep quiet where they know nothing."""

import json
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from whole_runs import refused as fdpo_refused
from whole_runs import works

from fashiondpo_pipeline import codecs, testing, wardrobe
from fashiondpo_pipeline.demo import outfits as rule
from fashiondpo_pipeline.embedded import locate
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts import compatibility
from fashiondpo_pipeline.experts.compatibility import Compatibility, Head, Triples
from fashiondpo_pipeline.experts.personalisation import Personalisation
from fashiondpo_pipeline.experts.tower import Tower

SHIPPED = locate("embedded:fashion_mini/outfits")
CATALOG = locate("embedded:fashion_mini/catalog.parquet")


def refused(call, *arguments, **options):
    with pytest.raises(UserError) as problem:
        call(*arguments, **options)
    return str(problem.value)


# -- what is shipped


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict]]:
    return {name: pq.read_table(SHIPPED / f"{name}.parquet").to_pylist() for name in ("outfits", "users")}


@pytest.fixture(scope="module")
def garments() -> dict[str, dict]:
    return {row["item"]: row for row in pq.read_table(CATALOG, columns=["item", "category", "colour", "split"]).to_pylist()}


def test_the_same_seed_gives_the_shipped_tables(tmp_path):
    """Their rows; a Parquet file also names the version that wrote it."""
    rule.write(tmp_path, CATALOG, json.loads((SHIPPED / "card.json").read_text())["made_from"]["seed"])
    for name in ("outfits.parquet", "users.parquet"):
        assert pq.read_table(tmp_path / name).equals(pq.read_table(SHIPPED / name), check_metadata=True)


def test_the_shipped_folder_is_known_to_be_whole_and_is_not_made_again():
    assert rule.make(SHIPPED.parent, 0) == "outfits: already there"


def test_every_outfit_is_four_kinds_of_garment_in_harmony(shipped, garments):
    assert Counter(row["split"] for row in shipped["outfits"]) == {"train": rule.TRAIN, "test": rule.TEST, "prompt": 300}
    for row in shipped["outfits"]:
        colours, kinds = zip(*((garments[item]["colour"], garments[item]["category"]) for item in row["items"]), strict=True)
        assert len(set(kinds)) == 4 and rule.harmonious(list(colours))


def test_outfits_to_learn_from_share_no_garment_with_those_to_test_on(shipped, garments):
    worn = {split: {item for row in shipped["outfits"] if row["split"] == split for item in row["items"]} for split in ("train", "test", "prompt")}
    assert not worn["train"] & (worn["test"] | worn["prompt"])


def test_every_prompt_has_an_outfit_that_lacks_just_what_it_asks_for(shipped, garments):
    prompts = {row["group"]: row for row in pq.read_table(locate("embedded:fashion_mini/prompts.parquet")).to_pylist()}
    likes = {row["user"]: row["likes"] for row in shipped["users"]}
    for row in (row for row in shipped["outfits"] if row["group"]):
        asked, prompt = garments[row["items"][row["place"]]], prompts.pop(row["group"])
        assert (asked["colour"], asked["category"]) == (prompt["colour"], prompt["category"])
        assert asked["colour"] in likes[row["user"]]
    assert not prompts


def test_no_user_has_bought_what_an_outfit_asks_for_and_all_was_bought_in_the_users_colours(shipped, garments):
    truth = {item for row in shipped["outfits"] if row["group"] for item in row["items"]}
    for row in shipped["users"]:
        assert not truth & set(row["items"])
        assert {garments[item]["colour"] for item in row["items"]} <= set(row["likes"])
        assert {garments[item]["category"] for item in row["items"]} == {row["category"]}


def test_the_shipped_head_beats_chance_on_garments_it_has_not_seen_and_belongs_to_the_shipped_tower():
    about = json.loads((SHIPPED / "compatibility" / "vbpr.json").read_text())
    assert about["held out"]["same category"]["low"] > 0.7 and about["held out"]["any garment"]["low"] > 0.82
    assert about["tower"] == Tower("local-dir:embedded:fashion_mini/clip").identity()
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 200_000


# -- a wardrobe of one's own


COLOURS = {"red": (200, 20, 20), "teal": (20, 150, 150), "blue": (30, 60, 220), "grey": (128, 128, 128)}


def png(colour, seed):
    noise = np.random.default_rng(seed).integers(-15, 16, (16, 16, 3))
    return {"bytes": codecs.encode_png((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)), "path": None}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Bags and shoes, six of each colour; an outfit is a bag and shoes of one colour. Two prompts, two users."""
    folder = tmp_path_factory.mktemp("wardrobe")
    items = [{"item": f"{colour}-{kind}-{n}", "picture": png(colour, 100 * n + len(colour)), "category": kind}
             for colour in COLOURS for kind in ("bag", "shoes") for n in range(6)]
    pq.write_table(pa.Table.from_pylist(items), folder / "items.parquet")
    outfits = [{"outfit": f"{colour}{n}", "user": "ann", "split": "test" if n > 3 else "train",
                "items": [f"{colour}-bag-{n}", f"{colour}-shoes-{n}"], "group": None, "place": None} for colour in COLOURS for n in range(6)]
    outfits[0] |= {"group": "red bag", "place": 0}
    outfits[6] |= {"group": "teal shoes", "place": 1, "user": "bob"}
    pq.write_table(pa.Table.from_pylist(outfits), folder / "outfits.parquet")
    users = [{"user": "ann", "category": "bag", "items": ["red-bag-0", "red-bag-1", "grey-bag-2"]},
             {"user": "bob", "category": "bag", "items": ["blue-bag-0"]}, {"user": "ann", "category": "shoes", "items": ["blue-shoes-3"]}]
    pq.write_table(pa.Table.from_pylist(users), folder / "users.parquet")
    return folder


def options(tables, tiny_clip, **more):
    return {"model": f"local-dir:{tiny_clip}", "outfits": str(tables / "outfits.parquet"), "items": str(tables / "items.parquet"), **more}


@pytest.fixture(scope="module")
def trained(tables, tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "head"
    about = compatibility.train(folder, f"local-dir:{tiny_clip}", None, str(tables / "outfits.parquet"), str(tables / "items.parquet"),
                                recipe=compatibility.Recipe(epochs=3, hidden=8, factors=4, negatives=2))
    return folder, about


def ready(expert, folder):
    expert.prepare(folder, "cpu")
    expert.load("cpu", folder)
    return expert


def rows(tower):
    pictures = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)) for n in range(3)]
    vectors = tower.pictures(pictures)
    return [{"group": group, "candidate": 0, "prompt": group, "embedding": vector}
            for group, vector in zip(("red bag", "teal shoes", "nobody's hat"), vectors, strict=True)]


# -- compatibility


def test_the_head_is_vbpr_with_the_outfit_in_the_users_place():
    """f and g as (x1, x2) -> leaky(x1), leaky(x2); v = (0, 10). Rest (1, 0), (0, 3): mean (0.5, 1.5). Item (2, -1): g = (2, -0.01)."""
    eye, nothing = np.eye(2), np.zeros(2)
    layers = {f"{name}.{layer}.{part}": value for name in ("rest", "item") for layer in (0, 2)
              for part, value in (("weight", eye), ("bias", nothing))}
    head = Head(layers | {"bias.weight": np.array([[0.0, 10.0]])})
    rest = head.rest(np.array([[1.0, 0.0], [0.0, 3.0]]))
    assert rest.tolist() == [0.5, 1.5]
    assert head.scores(rest, np.array([[2.0, -1.0]])) == pytest.approx([0.5 * 2 - 1.5 * 0.01 - 10])


def test_training_learns_what_goes_with_what_on_garments_it_has_not_seen(tables):
    """Features that say colour and kind and a little else; half of the outfits of each colour are kept from it."""
    garments = wardrobe.Garments(tables / "items.parquet")
    number = {item: n for n, item in enumerate(garments.category)}
    rng = np.random.default_rng(0)
    says = np.array([[item.startswith(colour) for colour in COLOURS] + [kind == "bag"] for item, kind in garments.category.items()], np.float32)
    features = np.concatenate([says, 0.1 * rng.normal(size=(len(says), 3)).astype(np.float32)], 1)
    learn, unseen = (Triples([[f"{c}-bag-{n}", f"{c}-shoes-{n}"] for c in COLOURS for n in some], garments, number)
                     for some in ((0, 1, 2), (3, 4, 5)))
    recipe = compatibility.Recipe(epochs=40, patience=40, hidden=16, factors=8, learning_rate=2e-2, batch=8, matched=1.0, negatives=2)
    losses = []
    weights, _ = compatibility._fit(features, learn, unseen, recipe, 0, lambda epoch, loss, auc: losses.append(loss))
    again, _ = compatibility._fit(features, learn, unseen, recipe, 0, lambda *_: None)
    assert losses[0] == pytest.approx(math.log(2), abs=0.2) and losses[-1] < 0.35
    won = compatibility.auc_of_outfits(Head(weights), features, unseen, True, 10, 1)
    # of another garment in its own category, two in eleven have the same colour and are as good: the best possible is 10/11 or so
    assert 0.85 < np.nanmean(won) <= 1 and won.shape == (12, 20)
    assert all((weights[name] == again[name]).all() for name in weights)


def test_training_stops_when_the_validation_gets_no_better(tables):
    garments = wardrobe.Garments(tables / "items.parquet")
    number = {item: n for n, item in enumerate(garments.category)}
    outfits = Triples([[f"{c}-bag-{n}", f"{c}-shoes-{n}"] for c in COLOURS for n in range(4)], garments, number)
    epochs = []
    compatibility._fit(np.zeros((len(number), 4), np.float32), outfits, outfits, compatibility.Recipe(patience=3), 0,
                       lambda epoch, loss, auc: epochs.append((epoch, auc)))
    assert epochs == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)]  # features that say nothing: all ties


def test_negatives_are_of_the_kind_asked_for_and_never_in_the_outfit(tables):
    garments = wardrobe.Garments(tables / "items.parquet")
    number = {item: n for n, item in enumerate(garments.category)}
    names = list(number)
    outfits = Triples([[f"{c}-bag-{n}", f"{c}-shoes-{n}"] for c in COLOURS for n in range(4)], garments, number)
    rng = np.random.default_rng(0)
    drawn = [names[outfits.negative(rng, 0, 0, True)] for _ in range(100)]
    assert {garments.category[item] for item in drawn} == {"bag"} and "red-bag-0" not in drawn
    assert {garments.category[names[outfits.negative(rng, 0, 0, False)]] for _ in range(100)} == {"bag", "shoes"}


def test_compatibility_keeps_the_contract_and_knows_only_prompts_with_an_outfit(tables, tiny_clip, trained, tmp_path):
    tower = Tower(f"local-dir:{tiny_clip}")
    expert = Compatibility(**options(tables, tiny_clip, weights=str(trained[0])))
    expert.prepare(tmp_path, "cpu")
    testing.check_expert(expert, rows(tower), prepared=tmp_path)
    red, teal, nobody = expert(rows(tower))
    head = compatibility.load_head(trained[0], tower)
    shoes = wardrobe.Garments(tables / "items.parquet").embed(["red-shoes-0"], tower)["red-shoes-0"]
    assert red == pytest.approx(head.scores(head.rest(shoes[None]), rows(tower)[0]["embedding"][None])[0])
    assert math.isfinite(teal) and math.isnan(nobody[0]) and nobody[1] == "no outfit is for the prompt 'nobody's hat'"


def test_a_head_is_refused_behind_another_tower(tables, trained, tmp_path):
    other = testing.tiny_clip(tmp_path / "other", seed=2)
    message = refused(Compatibility(**options(tables, other, weights=str(trained[0]))).prepare, tmp_path, "cpu")
    assert message.startswith(f"{trained[0]} was trained on the features of another CLIP tower (")
    assert message.endswith("): name the tower it was trained with, or train it anew")


def test_what_was_measured_lies_beside_the_weights(trained):
    folder, about = trained
    assert json.loads((folder / "vbpr.json").read_text()) == about
    assert about["outfits"] == {"train": 16, "test": 8}
    for found in about["held out"].values():
        assert 0 <= found["low"] <= found["auc"] <= found["high"] <= 1


def test_fdpo_trains_an_expert_once_and_says_how_to_use_it(tables, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["expert", "train", "compatibility", "--model", f"local-dir:{tiny_clip}", "--outfits", tables / "outfits.parquet",
             "--items", tables / "items.parquet", "--epochs", "1"]
    told = works(*words)
    assert "held-out AUC against same category" in told.err and "weights: compatibility" in told.err
    assert fdpo_refused(*words) == "compatibility holds a compatibility expert already: delete the folder, or name another with --out"
    assert fdpo_refused("expert", "train", "taste") == "no expert called 'taste' can be trained; known: compatibility"


def test_an_expert_that_was_not_trained_is_told_how_to_be(tables, tiny_clip, tmp_path):
    expert = Compatibility(**options(tables, tiny_clip, weights=str(tmp_path / "none")))
    assert refused(expert.files) == f"there is no compatibility expert in {tmp_path / 'none'}: `fdpo expert train compatibility` makes one"


# -- personalisation


def test_personalisation_is_the_cosine_with_what_the_user_bought_but_for_what_is_asked_for(tables, tiny_clip, tmp_path):
    """Ann asks for red-bag-0, which she has bought: it does not count. Bob has no history of shoes."""
    tower = Tower(f"local-dir:{tiny_clip}")
    expert = ready(Personalisation(**options(tables, tiny_clip, users=str(tables / "users.parquet"))), tmp_path)
    red, teal, nobody = expert(rows(tower))
    vectors = wardrobe.Garments(tables / "items.parquet").embed(["red-bag-1", "grey-bag-2"], tower)
    mean = (vectors["red-bag-1"].astype(float) + vectors["grey-bag-2"]) / 2
    assert red == pytest.approx(rows(tower)[0]["embedding"] @ mean / np.linalg.norm(mean), abs=1e-6)
    assert math.isnan(teal[0]) and teal[1] == "'bob' has no history in the category 'shoes'"
    assert math.isnan(nobody[0]) and nobody[1] == "no outfit is for the prompt 'nobody's hat'"


def test_without_a_history_everybodys_may_count(tables, tiny_clip, tmp_path):
    tower = Tower(f"local-dir:{tiny_clip}")
    expert = ready(Personalisation(**options(tables, tiny_clip, users=str(tables / "users.parquet"), without="category")), tmp_path)
    shoes = wardrobe.Garments(tables / "items.parquet").embed(["blue-shoes-3"], tower)["blue-shoes-3"]
    assert expert(rows(tower))[1] == pytest.approx(float(rows(tower)[1]["embedding"] @ shoes), abs=1e-6)


def test_everybodys_history_is_some_of_each_where_it_is_cut_short(tables, tiny_clip, tmp_path):
    """Bob has no history of shoes, two others have: two garments at most are the first of Ann's and the first of Cy's."""
    users = spoilt(tables, tmp_path, lambda rows: rows.extend([
        {"user": "ann", "category": "shoes", "items": ["blue-shoes-4", "blue-shoes-5"]},
        {"user": "cy", "category": "shoes", "items": ["grey-shoes-2", "grey-shoes-3"]}]), "users")
    tower = Tower(f"local-dir:{tiny_clip}")
    expert = ready(Personalisation(**options(tables, tiny_clip, users=str(users), without="category", most=2)), tmp_path)
    vectors = wardrobe.Garments(tables / "items.parquet").embed(["blue-shoes-3", "grey-shoes-2"], tower)
    mean = (vectors["blue-shoes-3"].astype(float) + vectors["grey-shoes-2"]) / 2
    assert expert(rows(tower))[1] == pytest.approx(float(rows(tower)[1]["embedding"] @ mean / np.linalg.norm(mean)), abs=1e-6)


def test_personalisation_keeps_the_contract(tables, tiny_clip, tmp_path):
    expert = Personalisation(**options(tables, tiny_clip, users=str(tables / "users.parquet")))
    expert.prepare(tmp_path, "cpu")
    testing.check_expert(expert, rows(Tower(f"local-dir:{tiny_clip}")), prepared=tmp_path)
    assert refused(Personalisation, "m", "u", "o", "i", without="zero") == "a personalisation expert's `without` is none or category, not 'zero'"


# -- tables that do not fit


def spoilt(tables, tmp_path, change, name="outfits"):
    found = pq.read_table(tables / f"{name}.parquet").to_pylist()
    change(found)
    pq.write_table(pa.Table.from_pylist(found), tmp_path / f"{name}.parquet")
    return tmp_path / f"{name}.parquet"


def test_each_fault_of_a_table_is_told(tables, tmp_path):
    path = tmp_path / "outfits.parquet"
    spoilt(tables, tmp_path, lambda rows: rows[1].update(group="red bag", place=0))
    assert refused(wardrobe.asked, path) == f"{path}: two outfits are for the prompt 'red bag'; keep one of them"
    spoilt(tables, tmp_path, lambda rows: rows[0].update(place=2))
    assert refused(wardrobe.asked, path) == f"{path}, outfit 'red0': place 2 is none of its 2 garments"
    for none in (None, []):
        spoilt(tables, tmp_path, lambda rows, none=none: rows[0].update(items=none))
        assert refused(wardrobe.asked, path) == f"{path}, outfit 'red0': it has no items, though the prompt 'red bag' asks for one; add them"
    spoilt(tables, tmp_path, lambda rows: [row.update(group=None) for row in rows])
    assert refused(wardrobe.asked, path) == f"{path}: no outfit is for a prompt; give some a `group` and a `place`"
    spoilt(tables, tmp_path, lambda rows: [row.pop("user") for row in rows])
    assert refused(wardrobe.asked, path) == f"{path}: no column 'user', only outfit, split, items, group, place"
    assert refused(wardrobe.asked, tmp_path / "x").startswith(f"there is no file {tmp_path / 'x'}: check the path")
    twice = spoilt(tables, tmp_path, lambda rows: rows.append(rows[0]), "items")
    assert refused(wardrobe.Garments, twice) == f"{twice}: a garment's key is given twice; keep one of them"


def test_an_outfit_with_a_garment_that_there_is_not_is_told(tables, tiny_clip, tmp_path):
    path = spoilt(tables, tmp_path, lambda rows: rows[3]["items"].append("green-hat"))
    message = refused(compatibility.train, tmp_path / "head", f"local-dir:{tiny_clip}", None, str(path), str(tables / "items.parquet"))
    assert message == f"{path}: no garment 'green-hat' in {tables / 'items.parquet'}; add it, or take it out"


def test_outfits_without_a_split_to_test_on_are_told(tables, tiny_clip, tmp_path):
    path = spoilt(tables, tmp_path, lambda rows: [row.update(split="train") for row in rows])
    message = refused(compatibility.train, tmp_path / "head", f"local-dir:{tiny_clip}", None, str(path), str(tables / "items.parquet"))
    assert message == f"{path}: 0 outfits of two garments or more in the split 'test', wanted 2; add some"


def few(tables, tmp_path, train, test, change=lambda rows: None):
    """A table of outfits with so many to learn from and to test on."""
    def keep(rows):
        kept = [row for split, count in (("train", train), ("test", test)) for row in [row for row in rows if row["split"] == split][:count]]
        rows[:] = kept
        change(rows)

    return spoilt(tables, tmp_path, keep)


def taught(tables, tiny_clip, tmp_path, path):
    return compatibility.train(tmp_path / "head", f"local-dir:{tiny_clip}", None, str(path), str(tables / "items.parquet"),
                               recipe=compatibility.Recipe(epochs=2, hidden=8, factors=4, negatives=2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("train", [4, 7, 13])
def test_few_outfits_are_enough_and_what_is_measured_of_them_is_a_number(tables, tiny_clip, tmp_path, train):
    """Two of them say when to stop: their garments are told from those of all outfits to learn from."""
    about = taught(tables, tiny_clip, tmp_path, few(tables, tmp_path, train, 2))
    assert about["outfits"] == {"train": train, "test": 2} and about["epochs"] >= 1
    assert all(0 <= value <= 1 for found in about["held out"].values() for value in found.values())


@pytest.mark.parametrize(("train", "test", "sentence"), [
    (3, 2, "3 outfits of two garments or more in the split 'train', wanted 4; add some"),
    (4, 1, "1 outfits of two garments or more in the split 'test', wanted 2; add some"),
])
def test_fewer_are_refused(tables, tiny_clip, tmp_path, train, test, sentence):
    path = few(tables, tmp_path, train, test)
    assert refused(taught, tables, tiny_clip, tmp_path, path) == f"{path}: {sentence}"
    assert not (tmp_path / "head").exists()


@pytest.mark.parametrize(("split", "told"), [("train", "6 outfits to learn from only 0 can be told from others by a garment, "),
                                            ("test", "4 outfits to test on only 0 can be told from others by a garment of the same category, ")])
def test_outfits_that_are_all_the_same_are_refused(tables, tiny_clip, tmp_path, split, told):
    def alike(rows):
        for row in rows:
            row["items"] = ["red-bag-0", "red-shoes-0"] if row["split"] == split else row["items"]

    path = few(tables, tmp_path, 8, 4, alike)
    assert refused(taught, tables, tiny_clip, tmp_path, path) == f"{path}: of the {told}wanted 2; add some that have the same categories"


def test_outfits_without_a_category_in_common_are_refused(tables, tiny_clip, tmp_path):
    """Of two outfits to test on, one is a bag with a bag, the other shoes with shoes."""
    def apart(rows):
        tests = [row for row in rows if row["split"] == "test"]
        tests[0]["items"], tests[1]["items"] = ["red-bag-4", "red-bag-5"], ["blue-shoes-4", "blue-shoes-5"]

    path = few(tables, tmp_path, 8, 2, apart)
    assert refused(taught, tables, tiny_clip, tmp_path, path) == (
        f"{path}: of the 2 outfits to test on only 0 can be told from others by a garment of the same category, wanted 2; "
        "add some that have the same categories")


def test_training_leaves_the_global_random_state_alone(tables):
    before = torch.random.get_rng_state()
    test_training_stops_when_the_validation_gets_no_better(tables)
    assert (torch.random.get_rng_state() == before).all()
