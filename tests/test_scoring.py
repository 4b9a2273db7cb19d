"""Pictures are read ahead and embedded in full tiles, and nobody can tell from the numbers."""

import gc
import math
import shutil
import threading
import time
import weakref

import numpy as np
import pyarrow as pa
import pytest
import torch

from fashiondpo_pipeline import codecs, schemas, testing
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts.ahead import ahead
from fashiondpo_pipeline.experts.clip import ClipText
from fashiondpo_pipeline.experts.texts import TILE, Texts
from fashiondpo_pipeline.experts.tower import Tower
from fashiondpo_pipeline.workspace import Output
from stages import embed, score

# -- work done ahead


def test_results_come_in_order_whoever_is_done_first():
    def slow_first(n):
        time.sleep(0.02 if n == 0 else 0)
        return n

    assert list(ahead(slow_first, range(20), most=4, threads=4)) == list(range(20))


def test_at_most_so_many_results_wait():
    begun = []
    results = ahead(lambda n: begun.append(n) or n, range(100), most=5)
    for taken in range(10):
        assert next(results) == taken
        assert len(begun) <= taken + 5


def test_it_is_done_in_other_threads():
    assert threading.get_ident() not in set(ahead(lambda _: threading.get_ident(), range(5), most=2))


def test_what_fails_fails_in_its_turn():
    results = ahead(lambda n: 6 // n, [3, 2, 0, 1], most=4)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_whoever_stops_early_leaves_no_thread_at_work():
    before = threading.active_count()
    results = ahead(lambda n: n, range(1000), most=3)
    next(results)
    results.close()
    assert threading.active_count() == before


# -- a tower


def test_experts_on_one_tower_hold_one_network_and_it_goes_with_the_last(tiny_clip, tmp_path):
    own = shutil.copytree(tiny_clip, tmp_path / "clip")  # other tests, before or after, keep a tower of the shared folder
    experts = [ClipText(f"local-dir:{own}"), ClipText(f"local-dir:{own}")]
    for expert in experts:
        expert.load("cpu", None)
        expert._tower.load()
    first, second = (weakref.ref(expert._tower._loaded.net) for expert in experts)
    assert first() is second()
    experts.pop()
    gc.collect()
    assert first() is not None
    experts.clear()
    del expert
    gc.collect()
    assert first() is None


# -- a run's pictures


GROUPS, K = 5, 30  # a shard is a group: 30 pictures are less than a tile, 150 are two tiles and a piece


@pytest.fixture(scope="module")
def candidates(tmp_path_factory) -> Output:
    """Five shards of 30 pictures; picture 7 of each is broken, and picture 9 has a fault."""
    out = Output(tmp_path_factory.mktemp("scoring") / "sample", {}, {})
    out.open()
    rng = np.random.default_rng(0)
    for shard in range(GROUPS):
        rows = [{"group": f"g{shard}", "candidate": n, "prompt": f"prompt {shard}", "fault": "not finite" if n == 9 else None,
                 "picture": {"bytes": b"none" if n == 7 else codecs.encode_png(rng.integers(255, size=(16, 16, 3), dtype=np.uint8)),
                             "path": None}} for n in range(K)]
        out.write(shard, candidates=pa.Table.from_pylist(rows, schemas.CANDIDATES))
    return out


@pytest.fixture(scope="module")
def tower(tiny_clip) -> Tower:
    return Tower(f"local-dir:{tiny_clip}")


def vectors(tower, candidates, shards) -> tuple[dict[int, list], list[str]]:
    told = []
    found = {shard.number: shard.vectors for shard in embed.embedded(tower, candidates, shards, told.append)}
    return found, told


def test_tiles_are_full_across_the_ends_of_shards(tower, candidates, monkeypatch):
    sizes, encode = [], Tower.encode
    monkeypatch.setattr(Tower, "encode", lambda self, seen: (sizes.append(len(seen)), encode(self, seen))[1])
    vectors(tower, candidates, list(range(GROUPS)))
    assert sizes == [TILE, TILE, GROUPS * (K - 2) - 2 * TILE]


def test_an_embedding_is_the_same_in_whatever_shards_it_comes(tower, candidates):
    together, told = vectors(tower, candidates, list(range(GROUPS)))
    assert list(together) == list(range(GROUPS))
    assert [text.partition(":")[0] for text in told] == [f"g{shard}/7" for shard in range(GROUPS)]
    for shard in range(GROUPS):
        alone, _ = vectors(tower, candidates, [shard])
        for n in range(K):
            if n in (7, 9):
                assert alone[shard][n] is together[shard][n] is None
            else:
                assert (alone[shard][n] == together[shard][n]).all()


def test_a_shard_is_handed_on_before_the_last_one_is_read(tower, candidates):
    assert next(embed.embedded(tower, candidates, [0, 1, 2, 3, 4] * 4, lambda text: None)).number == 0


# -- answers


def answers(expert, candidates, batch: int, shards=range(GROUPS)) -> dict[int, list]:
    prompts = {f"g{shard}": {"group": f"g{shard}", "prompt": f"prompt {shard}"} for shard in range(GROUPS)}
    read = score.Reader(expert, candidates, None, prompts)
    return {shard.number: shard.answers for shard in score.answered(expert, read, list(shards), batch)}


def test_answers_do_not_depend_on_batches_and_stand_at_their_candidate(candidates):
    by_one, by_many = (answers(testing.Brightness(), candidates, batch) for batch in (1, 7))
    table = candidates.table("candidates", shard=3).to_pylist()
    for n in range(K):
        if n == 7:
            assert math.isnan(by_many[3][n][0])
            assert "cannot be read" in by_many[3][n][1]
        elif n == 9:
            assert by_many[3][n][1] == "not finite"
        else:
            mean = np.asarray(codecs.decode_picture(table[n]["picture"]["bytes"], "here")).mean() / 255
            assert by_many[3][n] == by_one[3][n] == (pytest.approx(mean), None)


def test_a_users_mistake_ends_the_scoring(candidates):
    class Wrong(testing.Brightness):
        def __call__(self, rows):
            raise UserError("name a folder")

    with pytest.raises(UserError, match="name a folder"):
        answers(Wrong(), candidates, 8)


def test_texts_that_will_be_asked_next_fill_the_tile(tiny_clip):
    scores, passes = {}, {}
    rows = [{"group": f"g{n}", "prompt": f"prompt {n}", "embedding": np.ones(16, np.float32) / 4} for n in range(2 * TILE + 1)]
    for told in (True, False):
        expert = ClipText(f"local-dir:{tiny_clip}")
        expert.load("cpu", None)
        counted = passes_of(expert._tower)
        if told:
            expert.expect(rows)
        scores[told], passes[told] = [expert([row]) for row in rows], list(counted)
    assert passes == {True: [TILE, TILE, 1], False: [1] * len(rows)}
    assert scores[True] == scores[False]


def passes_of(tower: Tower) -> list[int]:
    """Fills up with how many texts each pass of the tower's text encoder is given; what it remembered is forgotten."""
    passes, encode = [], tower._loaded.texts._encode
    tower._loaded.texts = Texts(lambda new: (passes.append(len(new)), encode(new))[1])
    return passes


def test_experts_on_one_tower_encode_a_text_once(tiny_clip):
    first, second = ClipText(f"local-dir:{tiny_clip}"), ClipText(f"local-dir:{tiny_clip}")
    for expert in (first, second):
        expert.load("cpu", None)
    passes = passes_of(first._tower)
    rows = [{"group": "g", "prompt": "text of two experts", "embedding": np.ones(16, np.float32) / 4}]
    assert first(rows) == second(rows) and passes == [1]


# -- in a run


def test_one_expert_is_in_memory_at_a_time_but_a_tower_in_common_stays(place):
    from whole_runs import session

    run = session("experts.again={use: clip_text, options: {model: '" + session().config.experts["clip_t"].options["model"] + "'}}")
    run.expert("clip_t", None)._tower.load()
    net = weakref.ref(run.expert("clip_t", None)._tower._loaded.net)
    assert run.expert("again", None)._tower._loaded.net is net()
    gone = [weakref.ref(expert) for expert in run._loaded[1:]]
    run.expert("bright", None)
    gc.collect()
    assert len(gone) == 2 and all(expert() is None for expert in gone)


def test_scores_and_embeddings_say_whose_they_are(finished):
    import json

    from whole_runs import folder_of

    def manifest(name):
        return json.loads((folder_of(finished / "runs/t", 1, name) / "manifest.json").read_text())

    about = manifest("score-clip_t")["expert"]
    assert about["use"] == "clip_text" and about["version"] == 1 and about["range"] == [-1, 1] and about["preprocessing"] is None
    tower = manifest("embed-clip")["tower"]
    assert about["files"] == {"tower": tower["identity"]}
    assert tower["preprocessing"].startswith("Compose( Resize(size=16, interpolation=bicubic") and "0x" not in tower["preprocessing"]


def head(path, seed):
    torch.manual_seed(seed)
    torch.save(torch.nn.Linear(16, 1).state_dict(), path)


def more_experts(place) -> list[str]:
    """Overrides that add three experts to the run: an aesthetic head and colours on the run's own tower, and a meter."""
    from whole_runs import session

    tower = session().config.experts["clip_t"].options["model"]
    return [f"experts.taste={{use: aesthetic, options: {{model: '{tower}', head: {place / 'head.pth'}}}}}",
            f"experts.colour={{use: attributes, options: {{model: '{tower}', attribute: colour, choices: [red, blue]}}}}",
            "experts.sharp={use: sharpness}"]


def test_other_weights_or_another_version_make_that_experts_scores_stale_and_no_others(place, monkeypatch):
    from whole_runs import session

    from fashiondpo_pipeline.experts.aesthetic import Aesthetic

    def fingerprints():
        return {name: step.fingerprint for name, step in session(*more_experts(place)).chain(1).rounds[1].scores.items()}

    head(place / "head.pth", seed=0)
    first = fingerprints()
    head(place / "head.pth", seed=1)
    second = fingerprints()
    assert {name for name in first if first[name] != second[name]} == {"taste"}
    monkeypatch.setattr(Aesthetic, "version", 2)
    assert {name for name, found in fingerprints().items() if found != second[name]} == {"taste"}


def test_experts_that_come_later_touch_nothing_that_is_there(finished):
    import json

    from whole_runs import folder_of, results, table, works

    head(finished / "head.pth", seed=0)
    before = results(finished / "runs/t")
    works("score", "--round", "1", *(word for text in more_experts(finished) for word in ("--set", text)))
    after = results(finished / "runs/t")
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[1].rpartition("-")[0] for name in after.keys() - before.keys()} == {"score-taste", "score-colour", "score-sharp"}
    colour = table(folder_of(finished / "runs/t", 1, "score-colour"), "scores").to_pylist()
    for row in colour:
        green = "green" in row["group"]
        assert math.isnan(row["score"]) is green and row["reason"] == ("the prompt names no colour" if green else None)
    weights = torch.load(finished / "head.pth", weights_only=True)
    vectors = table(folder_of(finished / "runs/t", 1, "embed-clip"), "embeddings").to_pylist()
    for row, scored in zip(vectors, table(folder_of(finished / "runs/t", 1, "score-taste"), "scores").to_pylist(), strict=True):
        wanted = float(torch.tensor(row["embedding"]) @ weights["weight"][0] + weights["bias"][0])
        assert (row["group"], row["candidate"]) == (scored["group"], scored["candidate"]) and scored["score"] == pytest.approx(wanted, abs=1e-5)
    numbers = json.loads((folder_of(finished / "runs/t", 1, "score-colour") / "manifest.json").read_text())["numbers"]
    assert numbers["missing"] > 0 and numbers["scored"] + numbers["missing"] == len(colour)
