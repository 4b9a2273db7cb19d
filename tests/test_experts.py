"""Every built-in expert keeps the contract on tiny models; whatever an expert cannot say is NaN with a reason, never a zero."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fashiondpo_pipeline import codecs, experts, testing
from fashiondpo_pipeline.config import Expert
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts.classifier import Classifier
from fashiondpo_pipeline.experts.clip import ClipImage, ClipText
from fashiondpo_pipeline.experts.tower import Tower

COLOURS = ["red", "green", "blue", "navy"]


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 16, 3), dtype=np.uint8))


def png(seed):
    return {"bytes": codecs.encode_png(np.asarray(picture(seed))), "path": f"{seed}.png"}


@pytest.fixture(scope="module")
def tower(tiny_clip):
    return Tower(f"local-dir:{tiny_clip}")


@pytest.fixture
def rows(tower):
    """One candidate of each of four prompts, with all that any built-in needs."""
    pictures = [picture(seed) for seed in range(4)]
    return [
        {"group": f"g{i}", "candidate": 0, "prompt": f"a {colour} bag", "colour": colour, "picture": pictures[i],
         "embedding": vector, "reference": png(i + 10)}
        for i, (colour, vector) in enumerate(zip(COLOURS, tower.pictures(pictures), strict=True))
    ]


@pytest.fixture(scope="module")
def tiny_classifier(tmp_path_factory):
    """A transformers ResNet of random weights that knows three colours."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("models") / "classifier"
    torch.manual_seed(0)
    labels = dict(enumerate(COLOURS[:3]))
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    config = ResNetConfig(**shape, id2label=labels, label2id={label: n for n, label in labels.items()})
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def catalog(tmp_path):
    """Two red references, one green, one blue."""
    table = pa.table({"picture": [png(20), png(21), png(22), png(23)], "colour": ["red", "red", "green", "blue"]})
    pq.write_table(table, tmp_path / "catalog.parquet")
    return tmp_path / "catalog.parquet"


def loaded(expert, prepared=None):
    expert.load("cpu", prepared)
    return expert


def refused(call, *arguments, **options):
    with pytest.raises(UserError) as problem:
        call(*arguments, **options)
    return str(problem.value)


# -- the contract


def test_clip_text_keeps_the_contract(tiny_clip, rows):
    testing.check_expert(ClipText(f"local-dir:{tiny_clip}"), rows)


def test_clip_image_keeps_the_contract_with_a_reference_in_each_prompt(tiny_clip, rows):
    testing.check_expert(ClipImage(f"local-dir:{tiny_clip}"), rows)


def test_clip_image_keeps_the_contract_with_a_catalogue(tiny_clip, rows, catalog, tmp_path):
    expert = ClipImage(f"local-dir:{tiny_clip}", references=str(catalog), match=["colour"])
    expert.prepare(tmp_path, "cpu")
    testing.check_expert(expert, rows, prepared=tmp_path)


def test_the_classifier_keeps_the_contract(tiny_classifier, rows):
    testing.check_expert(Classifier(str(tiny_classifier), "{colour}"), rows)


def test_brightness_keeps_the_contract(rows):
    testing.check_expert(testing.Brightness(), rows)


# -- what the built-ins measure


def test_clip_text_is_the_cosine_of_picture_and_prompt(tiny_clip, tower, rows):
    texts = tower.texts([row["prompt"] for row in rows])
    wanted = [float(row["embedding"] @ text) for row, text in zip(rows, texts, strict=True)]
    assert loaded(ClipText(f"local-dir:{tiny_clip}"))(rows) == pytest.approx(wanted, abs=1e-6)


def test_a_tower_gives_open_clips_own_unit_vectors(tiny_clip, tower):
    import open_clip

    net, see = open_clip.create_model_from_pretrained(f"local-dir:{tiny_clip}")
    read = open_clip.get_tokenizer(f"local-dir:{tiny_clip}")
    net.eval()
    with torch.no_grad():
        seen = net.encode_image(torch.stack([see(picture(0)), see(picture(1))]), normalize=True)
        said = net.encode_text(read(["a red bag"]), normalize=True)
    assert tower.pictures([picture(0), picture(1)]) == pytest.approx(seen.numpy(), abs=1e-6)
    assert tower.texts(["a red bag"]) == pytest.approx(said.numpy(), abs=1e-6)


def test_an_embedding_does_not_depend_on_what_is_embedded_with_it(tower):
    pictures = [picture(seed) for seed in range(70)]  # more than a tile
    together = tower.pictures(pictures)
    assert (together[66:67] == tower.pictures([pictures[66]])).all()
    assert (together[::-1] == tower.pictures(pictures[::-1])).all()


def test_clip_image_is_the_cosine_with_the_mean_of_the_references_that_match(tiny_clip, tower, rows, catalog, tmp_path):
    expert = ClipImage(f"local-dir:{tiny_clip}", references=str(catalog), match=["colour"])
    assert expert.needs == ("embedding", "colour") and expert.files() == {"references": catalog}
    expert.prepare(tmp_path, "cpu")
    found = loaded(expert, tmp_path)(rows)
    references = [tower.pictures([picture(seed)])[0].astype(float) for seed in range(20, 24)]
    means = [(references[0] + references[1]) / 2, references[2], references[3]]
    wanted = [row["embedding"] @ mean / np.linalg.norm(mean) for row, mean in zip(rows, means, strict=False)]
    assert found[:3] == pytest.approx(wanted, abs=1e-5)
    assert math.isnan(found[3][0]) and found[3][1] == "no reference has colour 'navy'"


def test_clip_image_compares_with_the_prompts_own_reference_where_it_has_one(tiny_clip, tower, rows):
    rows[2]["reference"] = None
    found = loaded(ClipImage(f"local-dir:{tiny_clip}"))(rows)
    assert found[0] == pytest.approx(float(rows[0]["embedding"] @ tower.pictures([picture(10)])[0]), abs=1e-5)
    assert math.isnan(found[2][0]) and found[2][1] == "the prompt has no reference picture"


def test_a_classifier_gives_the_log_probability_of_the_label_asked_for(tiny_classifier, rows):
    expert = loaded(Classifier(str(tiny_classifier), "{colour}"))
    assert expert.needs == ("picture", "colour") and expert.files() == {"model": tiny_classifier}
    asked = [loaded(Classifier(str(tiny_classifier), label))(rows[:1])[0] for label in COLOURS[:3]]
    share = [math.exp(score) for score, _, _ in asked]
    assert sum(share) == pytest.approx(1)
    assert expert(rows)[0][0] == pytest.approx(math.log(share[0]))


def test_a_picture_is_right_where_the_classifiers_own_first_choice_was_asked_for(tiny_classifier, rows):
    asked = [loaded(Classifier(str(tiny_classifier), label))(rows[:3]) for label in COLOURS[:3]]  # label, picture
    scores = np.array([[opinion[0] for opinion in of_label] for of_label in asked])
    assert [[opinion[2] for opinion in of_label] for of_label in asked] == (scores == scores.max(0)).tolist()


def test_the_contract_asks_a_classifier_whether_each_picture_is_right(rows):
    class Silent(testing.Brightness):
        classifies = True

    with pytest.raises(AssertionError, match="classifies"):
        testing.check_expert(Silent(), rows)


def test_a_label_the_classifier_does_not_know_is_no_score(tiny_classifier, rows):
    score, reason = loaded(Classifier(str(tiny_classifier), "{colour}"))(rows)[3]
    assert math.isnan(score) and reason == "the classifier has no label 'navy'"


# -- experts that fail


class Moody:
    """Answers each row with what the row says; an exception is raised."""

    version, range, needs = 1, (-math.inf, math.inf), ("picture",)

    def load(self, device, prepared):
        pass

    def __call__(self, rows):
        for row in rows:
            if isinstance(row["answer"], BaseException):
                raise row["answer"]
        return [row["answer"] for row in rows]


def asked(*answers):
    return experts.ask(Moody(), [{"answer": answer} for answer in answers])


def test_an_expert_that_raises_on_some_rows_scores_the_others():
    found = asked(1.0, ValueError("no sleeve in sight"), 3, KeyError("x"))
    assert [found[0], found[2]] == [(1.0, None), (3.0, None)]
    assert math.isnan(found[1][0]) and found[1][1] == "ValueError: no sleeve in sight"
    assert math.isnan(found[3][0]) and found[3][1] == "KeyError: 'x'"


def test_an_expert_that_always_raises_gives_a_reason_for_each():
    assert [reason for _, reason in asked(*[RuntimeError(f"no {i}") for i in range(3)])] == [
        "RuntimeError: no 0", "RuntimeError: no 1", "RuntimeError: no 2",
    ]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (math.nan, "the expert answered nan"), (math.inf, "the expert answered inf"), (-math.inf, "the expert answered -inf"),
        (None, "the expert answered nan"), ((math.nan, "too dark"), "too dark"), ((2.0, None), None),
        (np.float32(2.0), None), (torch.tensor(2.0), None),
    ],
)
def test_what_is_no_number_is_missing_with_a_reason(answer, reason):
    ((score, found),) = asked(answer)
    assert found == reason
    assert math.isnan(score) if reason else score == 2.0


def test_an_expert_that_gives_too_few_scores_is_named():
    class Short(Moody):
        def __call__(self, rows):
            return [1.0]

    assert refused(experts.ask, Short(), [{}, {}, {}]) == "Short gave 1 scores for 3 pictures: one for each is the contract"


def test_a_users_mistake_is_not_taken_for_a_missing_score():
    assert refused(asked, UserError("name a model")) == "name a model"


# -- making experts


class Greedy(Moody):
    def __init__(self, **options):
        self.options = options


def test_options_go_to_the_constructor():
    made = experts.make("mine", "clip_text", {"model": "ViT-B-32", "pretrained": "openai"})
    assert made.tower == ("ViT-B-32", "openai")


def test_an_expert_that_takes_anything_is_given_anything(monkeypatch):
    monkeypatch.setattr(experts.EXPERTS, "find", lambda use: Greedy)
    assert experts.make("mine", "greedy", {"any": 1}).options == {"any": 1}


def test_every_option_that_does_not_fit_is_named_at_once():
    assert refused(experts.make, "taste", "classifier", {"modell": "x", "revision": "1"}).splitlines() == [
        "experts.taste.options.modell: unknown key; did you mean 'model'?",
        "experts.taste.options.model: missing; add it",
        "experts.taste.options.label: missing; add it",
    ]


def test_an_option_of_another_type_is_named_with_what_it_should_be():
    options = {"model": 5, "attribute": "colour", "choices": "red", "temperature": "hot", "template": ["a {}"], "column": None}
    assert refused(experts.make, "tint", "attributes", options).splitlines() == [
        "experts.tint.options.model: should be text, not 5",
        "experts.tint.options.choices: should be a list, not 'red'",
        "experts.tint.options.temperature: should be a number, not 'hot'",
    ]
    assert experts.make("tint", "attributes", {"model": "m", "attribute": "c", "choices": ["a", "b"], "temperature": 1}).temperature == 1


def test_what_does_not_fit_is_named_of_all_experts_at_once():
    entries = {"a": Expert(use="clip_tex"), "b": Expert(use="classifier"), "c": Expert(use="sharpness")}
    assert refused(experts.make_all, entries).splitlines() == [
        "no expert called 'clip_tex'; did you mean 'clip_text'?",
        "experts.b.options.model: missing; add it", "experts.b.options.label: missing; add it",
    ]


def test_an_unknown_kind_is_answered_with_the_nearest():
    assert refused(experts.make, "taste", "cliptext", {}) == "no expert called 'cliptext'; did you mean 'clip_text'?"


# -- models that cannot be loaded


def test_a_clip_model_without_weights_is_refused_before_it_is_built_with_random_ones():
    assert refused(Tower("ViT-B-32").identity) == (
        "CLIP model 'ViT-B-32': name its weights too (pretrained: laion2b_s34b_b79k), or a local-dir:PATH"
    )


def test_weights_of_another_activation_are_refused_before_they_are_fetched():
    assert refused(Tower("ViT-L-14", "openai").texts, ["a"]) == (
        "CLIP weights 'openai' were trained with QuickGELU, and 'ViT-L-14' is the model without it: name ViT-L-14-quickgelu")
    assert refused(Tower("ViT-B-32-quickgelu", "laion2b_s34b_b79k").texts, ["a"]).startswith("CLIP model 'ViT-B-32-quickgelu' with weights")
    message = refused(Tower("ViT-L-14-quickgelu", "openai").texts, ["a"])  # these fit, and are not here
    assert message.startswith("CLIP model 'ViT-L-14-quickgelu' with weights 'openai' cannot be loaded (")


def test_an_unknown_clip_model_is_named():
    message = refused(Tower("ViT-Z-99", "openai").texts, ["a"])
    assert message.startswith("CLIP model 'ViT-Z-99' with weights 'openai' cannot be loaded (")
    assert message.endswith("): check both names, or name a folder with local-dir:PATH")


def test_a_clip_folder_that_is_not_there_is_named(tmp_path):
    assert refused(Tower(f"local-dir:{tmp_path / 'none'}").identity) == (
        f"CLIP model 'local-dir:{tmp_path / 'none'}': there is nothing at {tmp_path / 'none'}; "
        "check the path (relative ones start in the working folder)"
    )


def test_a_tower_is_its_files_not_their_place(tiny_clip, tmp_path):
    import shutil

    shutil.copytree(tiny_clip, tmp_path / "copy")
    first, second = Tower(f"local-dir:{tiny_clip}").identity(), Tower(f"local-dir:{tmp_path / 'copy'}").identity()
    assert first == second
    (tmp_path / "copy" / "open_clip_config.json").write_text("{}")
    assert Tower(f"local-dir:{tmp_path / 'copy'}").identity() != first
    assert Tower("ViT-B-32", "openai").identity() == "ViT-B-32/openai"


def test_a_classifier_that_is_none_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    message = refused(Classifier(str(tmp_path), "x").load, "cpu", None)
    assert message.startswith(f"classifier '{tmp_path}' cannot be loaded (")
    assert message.endswith("): name a folder or hub id of a transformers image classifier")


def test_references_without_match_are_refused():
    assert refused(ClipImage, "ViT-B-32", references="x.parquet") == (
        "a clip_image expert with `references` needs `match`: columns that prompts and references share"
    )


def test_a_catalogue_without_a_column_is_named(tiny_clip, catalog, tmp_path):
    expert = ClipImage(f"local-dir:{tiny_clip}", references=str(catalog), match=["colour", "size"])
    assert refused(expert.prepare, tmp_path, "cpu") == f"{catalog}: no column 'size', only picture, colour"


def test_a_broken_reference_is_named_with_its_row(tiny_clip, tmp_path):
    table = pa.table({"picture": [png(0), {"bytes": b"broken", "path": "x"}], "colour": ["red", "red"]})
    pq.write_table(table, tmp_path / "c.parquet")
    expert = ClipImage(f"local-dir:{tiny_clip}", references=str(tmp_path / "c.parquet"), match=["colour"])
    assert refused(expert.prepare, tmp_path, "cpu") == (
        f"{tmp_path / 'c.parquet'}, row 1: the picture cannot be read (it is none); re-make it or take the row out"
    )


# -- the contract check itself


class Shy(testing.Brightness):
    """Brightness with one fault, chosen by name."""

    def __init__(self, fault):
        self.fault, self.calls, self.loads = fault, 0, 0

    def load(self, device, prepared):
        self.loads += 1

    def __call__(self, rows):
        self.calls += 1
        scores = super().__call__(rows)
        if self.fault == "rows":
            rows[0]["score"] = scores[0]
        if self.fault == "blank" and len(set(rows[0]["picture"].tobytes())) == 1:
            raise ZeroDivisionError
        return {
            "short": scores[:-1], "range": [score + 2 for score in scores], "moody": [score / self.calls for score in scores],
            "order": [score / (n + 1) for n, score in enumerate(scores)],
            "neighbours": [score / len(rows) for score in scores],
            "silent": [math.nan] * len(rows), "infinite": [math.inf] * len(rows),
            "address": [(math.nan, f"failed at call {self.calls}")] * len(rows),
            "repeats": [score + 0.1 * (n and rows[n] is rows[n - 1]) for n, score in enumerate(scores)],
            "reloaded": [score / self.loads for score in scores],
        }.get(self.fault, scores)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("short", "3 scores for 4 rows"), ("range", "is outside the declared range"), ("moody", "asked twice, it gives other scores"),
        ("order", "depend on the order"), ("neighbours", "depend on the other rows"), ("silent", "NaN without a reason"),
        ("infinite", "outside the declared range"), ("address", "asked twice, it gives other reasons"), ("rows", "changes the rows"),
        ("repeats", "the same row three times"), ("reloaded", "loaded again"),
    ],
)
def test_the_contract_check_finds_what_is_wrong(rows, fault, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_expert(Shy(fault), rows)


def test_the_contract_check_lets_a_blank_picture_raise_what_it_raises(rows):
    with pytest.raises(ZeroDivisionError):
        testing.check_expert(Shy("blank"), rows)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"version": "1"}, "version is '1': a whole number from 1"), ({"version": 0}, "version is 0"), ({"range": (1.0, 0.0)}, "range is"),
        ({"needs": ["picture"]}, "needs is"), ({"needs": ("embedding",)}, "it needs an embedding, but has no `tower`"),
        ({"files": lambda: {"head": "head.pth"}}, "is 'head.pth': a Path"), ({"net": torch.nn.Linear(1, 1)}, "its constructor has made `net`"),
        ({"range": (-math.inf, math.inf), "fault": "infinite"}, "an infinite score"),
    ],
)
def test_the_contract_check_reads_what_is_declared(rows, declared, message):
    expert = Shy("none")
    vars(expert).update(declared)
    with pytest.raises(AssertionError, match=message):
        testing.check_expert(expert, rows)


def test_the_contract_check_lets_a_sound_expert_be(rows):
    testing.check_expert(Shy("none"), rows)


def test_the_contract_check_wants_an_expert(rows):
    with pytest.raises(AssertionError, match="an expert has version, range, needs"):
        testing.check_expert(len, rows)
