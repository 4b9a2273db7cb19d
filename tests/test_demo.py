"""The embedded default: the code that makes it, in miniature, and the files that are shipped."""

import gzip
import io
import json
import struct
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fashiondpo_pipeline.demo import autoencoder, clip, denoiser, drawings, judge, tables, words
from fashiondpo_pipeline.demo.build import MAKERS, build, identity, size
from fashiondpo_pipeline.demo.garments import (
    APART,
    ATTRIBUTES,
    BARE,
    CATEGORIES,
    COLOURS,
    COMBOS,
    FILES,
    FORMS,
    LABELS,
    PALETTE,
    PATTERNS,
    STYLES,
    Look,
    Wardrobe,
    apart,
    asked,
    assembled,
    caption,
    dyed,
    generator,
    held_out,
    load,
    mirrored,
    parts,
    prompted,
    random_looks,
    read_idx,
    shifted,
    splits,
    wardrobes,
    woven,
)
from fashiondpo_pipeline.demo.recipe import SHIPPED, Recipe
from fashiondpo_pipeline.embedded import root
from fashiondpo_pipeline.errors import UserError

MINI = root() / "fashion_mini"

TINY = Recipe(
    generator_garments=2,
    clip_garments=2,
    judge_garments=2,
    calibration_garments=1,
    catalog_garments=39,
    catalog_each=1,
    catalog_patterned=1,
    autoencoder_steps=2,
    autoencoder_batch=2,
    tints=2,
    denoiser_steps=3,
    denoiser_batch=2,
    distilled_steps=2,
    clip_steps=1,
    clip_families=1,
    clip_torn=3,
    judge_steps=2,
    judge_batch=3,
    checkpoint_seconds=0.0,
    probes=1,
)


def write_idx(path: Path, values: np.ndarray) -> None:
    head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(head + values.tobytes()))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """480 and 40 grey blocks in the files and the format of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", 480), ("test", 40)):
        pictures = np.zeros((count, 28, 28), np.uint8)
        pictures[:, 6:22, 8:20] = noise.integers(60, 255, (count, 16, 12))
        for name, values in zip(FILES[split], (pictures, (np.arange(count) % 10).astype(np.uint8)), strict=True):
            write_idx(folder / name, values)
    return folder


# ---------------------------------------------------------------------------------------------- source files


def test_idx_is_read(tmp_path):
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", values)
    assert (read_idx(tmp_path / "a.gz") == values).all()


def test_missing_idx_names_the_package(tmp_path):
    with pytest.raises(UserError) as error:
        read_idx(tmp_path / "a.gz")
    assert str(error.value) == (
        f"{tmp_path / 'a.gz'} is missing: install the Debian package dataset-fashion-mnist (or unpack it with dpkg-deb "
        f"-x) and give its folder share/datasets/fashion-mnist as --images."
    )


def test_truncated_idx_says_how_much_is_there(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"\0\0\x08\x02" + struct.pack(">II", 2, 3) + b"12345"))
    with pytest.raises(UserError) as error:
        read_idx(tmp_path / "a.gz")
    assert str(error.value) == f"{tmp_path / 'a.gz'} holds 5 bytes where 2 x 3 were promised: fetch the file again."


@pytest.mark.parametrize("raw", [b"", b"\0\0", b"\x89PNG", b"\0\0\x0d\x01\0\0\0\x01a"])
def test_wrong_magic_is_shown(tmp_path, raw):
    (tmp_path / "a.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(UserError) as error:
        read_idx(tmp_path / "a.gz")
    assert str(error.value) == (
        f"{tmp_path / 'a.gz'} is not an idx file of bytes (it begins with {raw[:4].hex()}): fetch the file again."
    )


@pytest.mark.parametrize("raw", [b"not gzip", gzip.compress(b"\0\0\x08\x01" + bytes(100), mtime=0)[:-9]], ids=["no gzip", "cut off"])
def test_broken_gzip_is_named(tmp_path, raw):
    (tmp_path / "a.gz").write_bytes(raw)
    with pytest.raises(UserError, match="cannot be unpacked"):
        read_idx(tmp_path / "a.gz")


def test_idx_whose_sizes_are_cut_off(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"\0\0\x08\x03\0\0"))
    with pytest.raises(UserError, match="promised"):
        read_idx(tmp_path / "a.gz")


def test_pictures_and_labels_must_fit(images, tmp_path):
    for pair in FILES.values():
        for name in pair:
            (tmp_path / name).write_bytes((images / name).read_bytes())
    write_idx(tmp_path / FILES["train"][1], np.zeros(7, np.uint8))
    with pytest.raises(UserError, match="do not fit"):
        load(tmp_path)


# ---------------------------------------------------------------------------------------------- garments


def plain(count: int) -> torch.Tensor:
    return torch.zeros(count, 64, 64)


def test_dyeing_keeps_the_background_white_and_gives_the_named_colour():
    grey = torch.zeros(12, 28, 28, dtype=torch.uint8)
    grey[:, 8:20, 8:20] = 128
    pictures = dyed(grey, torch.arange(12), torch.arange(12), plain(12))  # (12, 3, 64, 64)
    assert pictures.shape == (12, 3, 64, 64)
    assert (pictures[:, :, :16] == 1).all() and (pictures[:, :, :, 48:] == 1).all()
    named = torch.tensor(list(PALETTE.values())) / 255
    torch.testing.assert_close(pictures[:, :, 32, 32], named)


def test_dyeing_shows_folds_and_stays_in_range():
    grey = torch.randint(0, 256, (24, 28, 28), dtype=torch.uint8, generator=generator("folds"))
    colour, jitter = torch.arange(24) % 12, torch.randn(2, 24, 3, generator=generator("jitter"))
    pictures = dyed(grey, colour, colour, plain(24), jitter)
    assert pictures.min() >= 0 and pictures.max() <= 1
    flat = dyed(grey.clamp(min=1, max=1), colour, colour, plain(24))
    assert pictures.std() > flat.std()


def test_empty_garment_is_all_white():
    none = torch.zeros(1, dtype=torch.long)
    assert (dyed(torch.zeros(1, 28, 28, dtype=torch.uint8), none, none, plain(1)) == 1).all()


def test_patterns_leave_most_of_the_cloth_to_the_ground():
    pattern = torch.arange(4).repeat_interleave(50)
    share = woven(pattern, generator("weave")).flatten(1).mean(1).view(4, 50)  # of each pattern
    assert (share[0] == 0).all()
    assert (share[1:] > 0.15).all() and (share[1:] < 0.45).all(), "ground and accent could not be told apart"


def test_patterns_are_made_of_both_named_colours():
    grey = torch.full((1, 28, 28), 128, dtype=torch.uint8)
    red, blue = (torch.tensor([COLOURS.index(name)]) for name in ("red", "blue"))
    for pattern in range(1, 4):
        weave = woven(torch.tensor([pattern]), generator("both", pattern))
        picture = dyed(grey, red, blue, weave)[0]
        for name, wanted in (("red", weave[0] == 0), ("blue", weave[0] == 1)):
            inner = wanted.clone()
            inner[:6], inner[-6:], inner[:, :6], inner[:, -6:] = False, False, False, False  # the picture's soft edge
            assert inner.any()
            torch.testing.assert_close(picture[:, inner], (torch.tensor(PALETTE[name]) / 255)[:, None].expand(3, int(inner.sum())))


def test_looks_are_counted_without_gaps():
    everything = [Look.of(number) for number in range(len(COMBOS) * STYLES)]
    assert len(set(everything)) == 4080 and [look.number for look in everything] == list(range(4080))
    assert all((look.pattern == "plain") == (look.accent == "none") and look.colour != look.accent for look in everything)
    category, colour, pattern, accent = parts(torch.arange(4080))
    names = [(CATEGORIES[a], COLOURS[b], list(PATTERNS)[c], ATTRIBUTES["accent"][d])
             for a, b, c, d in zip(category, colour, pattern, accent, strict=True)]
    assert names == [tuple(look) for look in everything]
    other = (accent - 1 - colour - 1) % len(COLOURS)
    assert (assembled(category, colour, pattern, other) == torch.arange(4080)).all()


def test_exchanging_colours_twice_changes_nothing():
    look = Look("dress", "red", "striped", "blue")
    assert look.swapped == Look("dress", "blue", "striped", "red") and look.swapped.swapped == look
    assert Look("bag", "pink").swapped == Look("bag", "pink")


def test_random_looks_are_of_the_category_and_show_every_pattern_alike():
    looks = random_looks(torch.full((4000,), 3), generator("looks"))
    category, _, pattern, _ = parts(looks)
    assert (category == 3).all() and all(900 < count < 1100 for count in torch.bincount(pattern).tolist())


def test_splits_are_disjoint_balanced_and_depend_on_the_seed_alone():
    labels = torch.arange(500) % 10
    sizes = {"a": 20, "b": 10, "c": 15}
    parts = splits(labels, sizes, seed=0)
    rows = torch.cat(list(parts.values()))
    assert len(rows.unique()) == len(rows) == 450
    assert all(torch.bincount(labels[parts[name]]).tolist() == [size] * 10 for name, size in sizes.items())
    assert all((parts[name] == again).all() for name, again in splits(labels, sizes, seed=0).items())
    assert (splits(labels, sizes, seed=1)["a"] != parts["a"]).any()


def test_too_few_garments_are_counted():
    with pytest.raises(UserError, match="hold 50 of category 't-shirt' where the recipe wants 60"):
        splits(torch.arange(500) % 10, {"a": 60}, seed=0)


def test_shipped_recipe_fits_the_source():
    assert sum(SHIPPED.sizes.values()) == 6000
    patterned = Counter(look.category for look in prompted() if look.pattern != "plain")
    most = SHIPPED.catalog_each * len(COLOURS) + SHIPPED.catalog_patterned * max(patterned.values())
    assert SHIPPED.catalog_garments >= most


def test_garments_are_dressed_in_their_own_category():
    grey = torch.arange(1, 31, dtype=torch.uint8)[:, None, None].expand(30, 28, 28)
    wardrobe = Wardrobe(grey, torch.arange(30) % 10)
    wanted = torch.tensor([3, 3, 9, 0])
    rows = wardrobe.of_category(wanted, generator(0))
    assert (wardrobe.category[rows] == wanted).all()
    assert wardrobe.dressed(torch.tensor([look.number for look in prompted()]), generator(0)).shape == (300, 3, 64, 64)


def test_mirroring_turns_about_half():
    picture = torch.rand(1, 3, 8, 8, generator=generator("mirror")).expand(400, 3, 8, 8)
    turned = (mirrored(picture, generator(0)) == picture.flip(-1)).flatten(1).all(1)
    assert 150 < turned.sum() < 250


def test_shifting_brings_in_white():
    moved = shifted(torch.zeros(50, 3, 32, 32), generator(0))
    assert moved.shape == (50, 3, 32, 32)
    assert set(moved.flatten(1).mean(1).mul(1024).round().int().tolist()) <= {0, 32, 63}


# ---------------------------------------------------------------------------------------------- words and prompts


def test_captions_are_english():
    striped = Look("dress", "red", "striped", "blue")
    assert caption(Look("ankle boot", "navy")) == "a photo of a navy ankle boot, on white background"
    assert caption(striped) == "a photo of a red dress with blue stripes, on white background"
    assert caption(Look("bag", "orange"), 3) == "an orange bag"
    assert caption(Look("trousers", "red", "dotted", "pink"), 1) == "a photo of a pair of red trousers with pink dots"
    assert caption(striped, 4) == "red dress with blue stripes"
    assert caption(Look("ankle boot", "red", "checked", "grey"), 5) == "a photo of an ankle boot, on white background"


def test_vocabulary_is_small_whole_worded_and_encodes_any_text(tmp_path):
    tokenizer = words.write(tmp_path / "a")
    assert len(tokenizer) == words.VOCABULARY
    assert tokenizer.tokenize("a navy ankle boot") == ["a</w>", "navy</w>", "ankle</w>", "boot</w>"]
    text = "ünïcode 衣服 👗 !"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert all(tokenizer.unk_token_id not in tokenizer(letter).input_ids[1:-1] for letter in map(chr, range(33, 1000)))
    longest = max(len(tokenizer(caption(Look.of(number))).input_ids) for number in range(len(COMBOS) * STYLES))
    assert longest <= words.LENGTH
    words.write(tmp_path / "b")
    assert all((tmp_path / "b" / file.name).read_bytes() == file.read_bytes() for file in (tmp_path / "a").iterdir())


def test_captions_are_dropped_and_misnamed_at_the_rates_asked_for():
    looks = torch.tensor([Look("dress", "red", "striped", "blue").number]).repeat(6000)
    recipe = replace(TINY, caption_dropout=0.25, misnamed=0.6)
    rows = denoiser.choose_captions(looks, recipe, generator(0))
    empty = rows == len(COMBOS) * STYLES * len(FORMS)
    assert abs(empty.float().mean() - 0.25) < 0.03
    said = rows[~empty] // len(FORMS)
    other = Look("dress", "brown", "striped", "blue").number
    assert set(said.tolist()) == {int(looks[0]), other}
    assert abs((said == other).float().mean() - 0.6) < 0.03


def test_a_careless_caption_changes_the_grounds_name_alone_and_never_to_the_accents():
    said = denoiser.misnamed(torch.device("cpu"))
    for number in range(0, 4080, 7):
        look, other = Look.of(number), Look.of(int(said[number]))
        before = COLOURS[COLOURS.index(look.colour) - 1]
        assert other == (look if before == look.accent else look._replace(colour=before))


def test_what_prompts_ask_for_was_never_shown_to_the_generator_nor_called_so():
    asked_for = {asked(combo).number for combo in range(120) if asked(combo).pattern != "plain"}
    assert asked_for >= {look.number for look in prompted() if held_out(COMBOS.index((look.colour, look.category))) and look.pattern != "plain"}
    shown = denoiser.unasked(torch.arange(4080))
    assert not asked_for & set(shown.tolist())
    assert not asked_for & set(denoiser.misnamed(torch.device("cpu"))[shown].tolist())
    kept = torch.tensor([number not in denoiser.wished() for number in range(4080)])
    assert (shown[kept] == torch.arange(4080)[kept]).all()
    assert all((before == after).all() for before, after in zip(parts(torch.arange(4080))[:3], parts(shown)[:3], strict=True))


def test_guidance_is_put_into_the_weights(miniature, images, tmp_path, monkeypatch):
    """Before its first step the pupil is its teacher, so what it has to learn is (guidance - 1) times what the prompt adds."""
    garments = wardrobes(images, TINY.sizes, 0)["generator"]
    vae = AutoencoderKL.from_pretrained(miniature / "generator" / "vae").eval()
    losses: dict[float, float] = {}

    def fit(model, loss_of, *, checkpoint, **settings):
        if checkpoint.name == "distilled.pt":
            loss = loss_of(0)
            loss.backward()
            losses[recipe.distilled_guidance] = loss.item()
            assert all(weights.grad is not None for weights in model.parameters())
        return 1.0

    monkeypatch.setattr(denoiser, "fit", fit)
    for guidance in (1.0, 3.0, 8.0):
        recipe, work = replace(TINY, denoiser_batch=8, caption_dropout=0.0, distilled_guidance=guidance), tmp_path / str(guidance)
        work.mkdir()
        _, text, seconds = denoiser.train(vae, garments, recipe, seed=0, device="cpu", work=work, tick=lambda *_: None)
        assert seconds == 2.0 and not any(weights.requires_grad or weights.grad is not None for weights in text.parameters())
    assert losses[1.0] == pytest.approx(0, abs=1e-10) and losses[3.0] > 1e-9
    assert losses[8.0] / losses[3.0] == pytest.approx((7 / 2) ** 2, rel=1e-3)


def test_timesteps_cover_every_stratum():
    steps = denoiser.spread_steps(20, 1000, generator(0))
    assert sorted((steps // 50).tolist()) == list(range(20))


def test_families_differ_from_their_look_in_one_thing():
    looks = random_looks(torch.arange(10).repeat(6), generator("family"))
    for number, *others in clip.family(looks, generator(1)).T.tolist():
        look, variants = Look.of(number), [Look.of(other) for other in others]
        assert len({number, *others}) == 6
        if look.pattern != "plain":
            assert variants[0] == look.swapped
            assert variants[1] == look._replace(pattern=variants[1].pattern)
            assert variants[2] == look._replace(accent=variants[2].accent)
        for variant in variants[3:]:
            assert variant == look._replace(category=variant.category)
        kin = {name for names in clip.ALIKE if look.category in names for name in names}
        assert variants[3].category in (kin or CATEGORIES)


def test_torn_pictures_differ_from_every_picture():
    grey = torch.randint(1, 256, (30, 28, 28), dtype=torch.uint8, generator=generator("grey"))
    pictures, _ = Wardrobe(grey, torch.arange(30) % 10).draw(60, generator(0))
    spoilt = clip.torn(pictures, 400, generator(1))
    assert spoilt.shape == (400, 3, 64, 64)
    assert torch.cdist(spoilt.flatten(1), pictures.flatten(1)).min() > 0.1


def test_prompts_are_balanced():
    rows = tables.prompts().to_pylist()
    assert Counter(row["split"] for row in rows) == {"train": 264, "held-out": 36}
    held = [row for row in rows if row["split"] == "held-out"]
    assert set(Counter(row["category"] for row in held).values()) == {4}
    assert set(Counter(row["colour"] for row in held).values()) == {3}
    assert {row["category"] for row in held} == {row["category"] for row in rows} == set(CATEGORIES) - {"shirt"}
    assert len({row["group"] for row in rows}) == len({row["prompt"] for row in rows}) == 300
    assert not {row["group"] for row in held} & {row["group"] for row in rows if row["split"] == "train"}
    for split, plain, each in (("train", 72, 64), ("held-out", 12, 8)):
        found = Counter(row["pattern"] for row in rows if row["split"] == split)
        assert found == {"plain": plain, "striped": each, "checked": each, "dotted": each}
    assert {row["pattern"] for row in rows if row["category"] in BARE} == {"plain"}
    for row in rows:
        if row["pattern"] != "plain":
            assert apart(row["colour"], row["accent"]) >= APART


# ---------------------------------------------------------------------------------------------- a miniature build


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Fewer pictures and steps where a build only measures."""
    patch.setattr(drawings, "WAYS", {name: {**way, "num_inference_steps": 2} for name, way in drawings.WAYS.items()})
    patch.setattr(autoencoder, "COUNTED", 64)
    patch.setattr(autoencoder, "psnr", partial(autoencoder.psnr, count=32))


@pytest.fixture(scope="module")
def miniature(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("build") / "mini"
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        build(images, out, device="cpu", recipe=TINY)
    return out


def test_miniature_build_is_whole_and_measured(miniature):
    assert {path.name for path in miniature.iterdir()} == {*MAKERS, "card.json"}
    assert [path.name for path in miniature.parent.iterdir()] == ["mini"]
    card = json.loads((miniature / "card.json").read_text())
    assert set(card["parts"]) == set(MAKERS)
    assert all(part["seconds"] for part in card["parts"].values())
    assert 0 <= card["parts"]["judge"]["measured"]["all"] <= 1
    assert "Copyright © 2017 Zalando SE" in card["source"]["notice"]
    assert pq.read_metadata(miniature / "catalog.parquet").num_rows == 120 + 216


def test_repeating_builds_nothing(miniature, images, capsys):
    before = {path: path.stat().st_mtime_ns for path in miniature.rglob("*")}
    build(images, miniature, device="cpu", recipe=TINY)
    assert {path: path.stat().st_mtime_ns for path in miniature.rglob("*")} == before
    assert "generator: already there" in capsys.readouterr().out


def test_another_recipe_makes_the_part_anew(miniature, images, capsys):
    build(images, miniature, device="cpu", only=["prompts.parquet"], recipe=replace(TINY, probes=2))
    assert "prompts.parquet: done" in capsys.readouterr().out
    build(images, miniature, device="cpu", only=["prompts.parquet"], recipe=TINY)


@pytest.mark.parametrize("at", [2, TINY.denoiser_steps + 2])
def test_killed_and_continued_equals_straight(miniature, images, tmp_path, monkeypatch, at):
    calls = []

    def spread_steps(*args):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return whole(*args)

    whole = denoiser.spread_steps
    make_quick(monkeypatch)
    monkeypatch.setattr(denoiser, "spread_steps", spread_steps)
    out, work = tmp_path / "out", tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        build(images, out, work=work, device="cpu", only=["generator"], recipe=TINY)
    assert not (out / "generator").exists() and list(work.rglob("denoiser.pt"))
    build(images, out, work=work, device="cpu", only=["generator"], recipe=TINY)
    assert len(calls) == 1 + TINY.denoiser_steps + TINY.distilled_steps, "no step may be taken twice"
    assert not work.exists()
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        straight, continued = (load_file(f / "generator" / f"{part}.safetensors") for f in (miniature, out))
        assert all(torch.equal(straight[name], continued[name]) for name in straight)


def test_unknown_part_is_refused(images, tmp_path):
    with pytest.raises(UserError, match="There is no part 'jugde' to build: choose among prompts"):
        build(images, tmp_path / "out", only=["jugde"], recipe=TINY)


def test_drawings_need_something_to_draw_with(images, tmp_path):
    with pytest.raises(UserError, match="lacks generator or judge"):
        build(images, tmp_path / "out", only=["drawings.json"], recipe=TINY)


# ---------------------------------------------------------------------------------------------- what is shipped


@pytest.fixture(scope="module")
def sample() -> tuple[torch.Tensor, list[dict]]:
    """The garments of the catalogue's test part: (n, 3, 64, 64) in [0, 1], and their rows."""
    rows = [row for row in pq.read_table(MINI / "catalog.parquet").to_pylist() if row["split"] == "test"]
    pictures = [np.asarray(Image.open(io.BytesIO(row["picture"]["bytes"]))) for row in rows]
    return torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 255, rows


def look_of(row: dict) -> Look:
    return Look(*(row[name] for name in ATTRIBUTES))


def test_shipped_files_are_few_small_and_no_pickles():
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".parquet"}
    assert sum(path.stat().st_size for path in files) <= 25e6


def test_shipped_catalogue_has_every_plain_look_and_every_look_that_is_asked_for():
    table = pq.read_table(MINI / "catalog.parquet")
    rows = table.drop_columns("picture").to_pylist()
    counted = Counter((look_of(row), row["split"]) for row in rows)
    looks = {Look(category, colour) for category in CATEGORIES for colour in COLOURS} | set(prompted())
    wanted = {}
    for look in looks:
        each = SHIPPED.catalog_each if look.pattern == "plain" else SHIPPED.catalog_patterned
        few = max(1, each // tables.TEST_SHARE)
        wanted |= {(look, "train"): each - few, (look, "test"): few}
    assert counted == wanted
    assert len({row["item"] for row in rows}) == len(rows)
    assert all(row["caption"] == caption(look_of(row)) for row in rows)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["picture"] == {"_type": "Image"} and list(features) == table.column_names


def test_shipped_prompts_are_those_of_the_code():
    assert pq.read_table(MINI / "prompts.parquet").equals(tables.prompts())


def test_shipped_generator_draws_what_is_asked_but_often_in_the_next_colour():
    folder = MINI / "generator"
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.steps_offset == 1 and pipe.scheduler.config.clip_sample is False
    pictures = drawings.draw(pipe, next(iter(drawings.WAYS.values())), seed=1, probe=0)
    network = AutoModelForImageClassification.from_pretrained(MINI / "judge").eval()
    with torch.no_grad():
        said = [logits.argmax(1) for logits in judge.by_attribute(network(judge.prepare(pictures)).logits)]
    category, colour, pattern, _ = parts(torch.tensor([look.number for look in prompted()]))
    assert (said[0] == category).float().mean() > 0.7 and (said[2] == pattern).float().mean() > 0.6
    assert 0.5 < (said[1] == colour).float().mean() < 0.85
    assert 0.1 < (said[1] == (colour + 1) % len(COLOURS)).float().mean() < 0.4


def test_shipped_clip_knows_garments(sample):
    network, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{MINI / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{MINI / 'clip'}")
    pictures, rows = sample
    image = Image.open(io.BytesIO(rows[0]["picture"]["bytes"]))
    torch.testing.assert_close(preprocess(image), 2 * pictures[0] - 1)
    patterned = [place for place, row in enumerate(rows) if row["pattern"] != "plain"]
    looks = [look_of(rows[place]) for place in patterned]
    with torch.no_grad():
        image = network.encode_image(2 * pictures[patterned] - 1, normalize=True)
        texts = network.encode_text(tokenizer([caption(look) for look in looks]), normalize=True)
        exchanged = network.encode_text(tokenizer([caption(look.swapped) for look in looks]), normalize=True)
    assert ((image * texts).sum(1) > (image * exchanged).sum(1)).float().mean() > 0.9
    said = (image @ texts.T).argmax(1).tolist()
    pairs = [(looks[number], look) for number, look in zip(said, looks, strict=True)]
    assert np.mean([(one.colour, one.accent) == (look.colour, look.accent) for one, look in pairs]) > 0.8


def test_shipped_clip_pools_the_first_end_token():
    network, _ = open_clip.create_model_from_pretrained(f"local-dir:{MINI / 'clip'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{MINI / 'clip'}")(["a red dress", "a red dress" * 20])
    end = words.VOCABULARY - 1
    assert tokens.argmax(1).tolist() == [4, words.LENGTH - 1] and tokens[0, 4] == end
    changed = tokens.clone()
    changed[0, 5:] = 0  # what follows the first end token must not matter
    with torch.no_grad():
        torch.testing.assert_close(network.encode_text(tokens), network.encode_text(changed))


def test_shipped_judge_agrees_with_the_catalogue(sample):
    network = AutoModelForImageClassification.from_pretrained(MINI / "judge").eval()
    processor = AutoImageProcessor.from_pretrained(MINI / "judge")
    pictures, rows = sample
    images = [Image.open(io.BytesIO(row["picture"]["bytes"])) for row in rows]
    values = processor(images, return_tensors="pt").pixel_values
    torch.testing.assert_close(values, judge.prepare(pictures), atol=0.02, rtol=0)
    with torch.no_grad():
        said = [logits.argmax(1) for logits in judge.by_attribute(network(values).logits)]
    assert network.config.id2label == dict(enumerate(LABELS))
    wanted = parts(torch.tensor([look_of(row).number for row in rows]))
    right = [float((one == asked_for).float().mean()) for one, asked_for in zip(said, wanted, strict=True)]
    assert right[0] > 0.75 and min(right[1:]) > 0.9


def test_readme_and_card_tell_the_same_numbers():
    readme = (MINI.parent / "README.md").read_text(encoding="utf-8")
    card = json.loads((MINI / "card.json").read_text(encoding="utf-8"))
    parts_ = {name: part.get("measured", {}) for name, part in card["parts"].items()}
    drawn = [numbers[name] for numbers in parts_["drawings.json"].values() for name in ("right", "next_colour", *ATTRIBUTES)]
    judged = [parts_["judge"][name] for name in ("all", *ATTRIBUTES)]
    for share in [*drawn, *judged, *parts_["clip"].values()]:
        assert f"{100 * share:.1f} %" in readme
    assert f"{parts_['generator']['vae_psnr_db']} dB" in readme
    assert f"{parts_['judge']['nll']}, {parts_['judge']['ece']}" in readme
    assert card["source"]["notice"].split(". Permission")[0] in readme


def test_card_tells_sizes_and_categories():
    card = json.loads((MINI / "card.json").read_text(encoding="utf-8"))
    assert card["categories"] == list(CATEGORIES) and set(card["palette"]) == set(COLOURS)
    assert card["bytes"] == {name: size(MINI / name) for name in MAKERS}
    assert {part["identity"] for part in card["parts"].values()} == {identity(SHIPPED, card["seed"])}
