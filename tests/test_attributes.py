"""Zero-shot attributes: the probability of what the prompt asks for, and of nothing where it asks for nothing."""

import math

import numpy as np
import pytest

from fashiondpo_pipeline import testing
from fashiondpo_pipeline.codecs import decode_picture
from fashiondpo_pipeline.embedded import root
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts.attributes import Attributes, mentioned, shares
from fashiondpo_pipeline.experts.tower import Tower

MINI = "local-dir:embedded:fashion_mini/clip"


def loaded(expert):
    expert.load("cpu", None)
    return expert


def scores(expert, *rows):
    return [opinion[0] for opinion in loaded(expert)(list(rows))]


def refused(*arguments, **options):
    with pytest.raises(UserError) as problem:
        Attributes(*arguments, **options)
    return str(problem.value)


def row(prompt, embedding=None, **columns):
    vector = np.eye(16, dtype=np.float32)[0] if embedding is None else embedding
    return {"group": prompt, "candidate": 0, "prompt": prompt, "embedding": vector, **columns}


def test_shares_are_a_softmax_of_cosines():
    choices = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = shares(np.array([1.0, 0.0], np.float32), choices, temperature=0.5)  # logits 2 and 0
    assert found == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))])
    assert shares(np.array([1.0, 0.0], np.float32), choices, temperature=1e-4) == pytest.approx([1, 0])  # no overflow


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a RED dress", ["red"]), ("a tired dresser", []), ("red, then blue", ["red", "blue"]), ("a red-blue bag", []),
        ("a sky blue bag", ["sky blue"]), ("sky blue and blue", ["blue", "sky blue"]), ("", []),
    ],
)
def test_a_choice_is_found_as_a_word_of_its_own(text, found):
    assert mentioned(text, ["red", "blue", "sky blue"]) == found


def test_the_score_is_the_probability_of_the_wanted_choice(tiny_clip, tmp_path):
    name, colours = f"local-dir:{tiny_clip}", ["red", "green", "blue"]
    tower = Tower(name)
    vector = tower.texts(["something else"])[0]
    wanted = shares(vector, tower.texts([f"a {colour} bag" for colour in colours]).astype(float), 0.1)
    options = {"attribute": "colour", "choices": colours, "template": "a {} bag", "temperature": 0.1}
    assert scores(Attributes(name, **options), row("a green hat", vector), row("a Red hat", vector)) == pytest.approx([wanted[1], wanted[0]])
    assert scores(Attributes(name, **options, wanted="blue"), row("a green hat", vector)) == pytest.approx([wanted[2]])
    by_column = Attributes(name, **options, column="tint")
    assert by_column.needs == ("embedding", "tint")
    assert scores(by_column, row("a hat", vector, tint="green")) == pytest.approx([wanted[1]])


def test_right_is_what_no_other_choice_is_likelier_than(tiny_clip):
    """Also where it is not likely: of three choices the likeliest may have a third."""
    name, colours = f"local-dir:{tiny_clip}", ["red", "green", "blue"]
    vectors = Tower(name).texts([f"a {colour} bag" for colour in colours])
    flat = loaded(Attributes(name, "colour", colours, template="a {} bag", temperature=100.0))
    rows = [row(f"a {asked} hat", vector) for vector in vectors for asked in colours]
    said = flat(rows)
    assert [right for *_, right in said] == [seen == asked for seen in colours for asked in colours]
    assert all(0.3 < score < 0.4 and reason is None for score, reason, _ in said)
    (silent,) = flat([row("a hat", vectors[0])])
    assert math.isnan(silent[0]) and silent[1:] == ("the prompt names no colour",), "what is not asked for is neither right nor wrong"


def test_several_sentences_are_averaged(tiny_clip):
    expert = loaded(Attributes(f"local-dir:{tiny_clip}", "colour", ["red", "blue"], template=["a {} bag", "{} cloth"]))
    said = Tower(f"local-dir:{tiny_clip}").texts(["a blue bag", "blue cloth"]).astype(float)
    assert expert.vectors()[1] == pytest.approx(said.mean(0) / np.linalg.norm(said.mean(0)))


def test_where_the_prompt_wants_none_there_is_no_score(tiny_clip):
    name = f"local-dir:{tiny_clip}"
    by_text = loaded(Attributes(name, "sleeve", ["long", "short"]))
    assert [reason for _, reason in by_text([row("a dress"), row("short or long")])] == [
        "the prompt names no sleeve", "the prompt names several: long, short"]
    by_column = loaded(Attributes(name, "sleeve", ["long", "short"], column="sleeve"))
    assert [reason for _, reason in by_column([row("a", sleeve="none"), row("a", sleeve=None)])] == [
        "the sleeve 'none' is none of the choices", "the prompt's sleeve is empty"]
    assert all(math.isnan(score) for score, _ in by_text([row("a dress")]))


def test_it_keeps_the_contract(tiny_clip):
    vectors = Tower(f"local-dir:{tiny_clip}").texts(["one", "two", "three", "four"])
    rows = [row(prompt, vector) for prompt, vector in zip(["a red bag", "a blue bag", "a bag", "red"], vectors, strict=True)]
    testing.check_expert(Attributes(f"local-dir:{tiny_clip}", "colour", ["red", "blue"]), rows)


def test_everything_that_does_not_fit_is_said_at_once():
    assert refused("ViT-B-32", "colour", ["red", "Red"], template="a photo", wanted="blue", column="colour", temperature=0).splitlines() == [
        "attribute 'colour': choices: two are the same",
        "attribute 'colour': template: write {} once in each, where the choice goes",
        "attribute 'colour': wanted and column: give one of them, or neither",
        "attribute 'colour': wanted 'blue' is none of the choices",
        "attribute 'colour': temperature: should be above 0",
    ]
    assert refused("ViT-B-32", "colour", ["red"], template="{colour} {}").splitlines() == [
        "attribute 'colour': choices: name two or more", "attribute 'colour': template: write {} once in each, where the choice goes"]


@pytest.fixture(scope="module")
def catalogue():
    """(rows with embeddings, tables' columns) of the plain garments of the catalogue's test split, which taught no network."""
    import pyarrow.parquet as pq

    table = pq.read_table(root() / "fashion_mini/catalog.parquet")
    rows = [found for found in table.to_pylist() if found["split"] == "test" and found["pattern"] == "plain"]
    vectors = Tower(MINI).pictures([decode_picture(found["picture"]["bytes"], "catalogue") for found in rows])
    return [found | {"prompt": found["caption"], "group": found["item"], "candidate": 0, "embedding": vector}
            for found, vector in zip(rows, vectors, strict=True)]


@pytest.mark.parametrize(("attribute", "least"), [("colour", 0.9), ("category", 0.55)])
def test_the_embedded_clip_tells_colours_and_categories_in_words_new_to_it(catalogue, attribute, least):
    choices = sorted({found[attribute] for found in catalogue})
    template = {"colour": "a photo of a {} garment", "category": "a photo of a {}, on white background"}[attribute]
    expert = loaded(Attributes(MINI, attribute, choices, template=template))
    known = expert.vectors()
    likeliest = [choices[int(shares(found["embedding"], known, 0.01).argmax())] == found[attribute] for found in catalogue]
    said = expert(catalogue)
    assert [right for *_, right in said] == likeliest and np.mean(likeliest) >= least
    assert said == loaded(Attributes(MINI, attribute, choices, template=template, column=attribute))(catalogue)
    other = [found | {"prompt": found["caption"].replace(found[attribute], choices[choices.index(found[attribute]) - 1])} for found in catalogue]
    assert np.mean([one[0] > two[0] for one, two in zip(said, expert(other), strict=True)]) >= least
