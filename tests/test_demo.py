"""The embedded default: the code that makes it, in miniature, and the files that are shipped."""

import gzip
import io
import json
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fashiondpo_pipeline.demo import clip, denoiser, drawings, judge, tables, words
from fashiondpo_pipeline.demo.build import MAKERS, build, identity, size
from fashiondpo_pipeline.demo.garments import (
    CATEGORIES,
    COLOURS,
    COMBOS,
    FILES,
    LABELS,
    PALETTE,
    Wardrobe,
    caption,
    generator,
    load,
    read_idx,
    shifted,
    splits,
    tint,
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
    catalog_garments=12,
    autoencoder_steps=2,
    autoencoder_batch=2,
    tints=2,
    denoiser_steps=3,
    denoiser_batch=2,
    clip_steps=1,
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
    """200 and 40 grey blocks in the files and the format of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 40)):
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


def test_tinting_keeps_the_background_white_and_gives_the_named_colour():
    grey = torch.zeros(12, 28, 28, dtype=torch.uint8)
    grey[:, 8:20, 8:20] = 128
    pictures = tint(grey, torch.arange(12))  # (12, 3, 32, 32)
    assert pictures.shape == (12, 3, 32, 32)
    assert (pictures[:, :, :10] == 1).all() and (pictures[:, :, :, 22:] == 1).all()
    wanted = torch.tensor(list(PALETTE.values())) / 255
    torch.testing.assert_close(pictures[:, :, 15, 15], wanted)


def test_tinting_shows_folds_and_stays_in_range():
    grey = torch.randint(0, 256, (24, 28, 28), dtype=torch.uint8, generator=generator("folds"))
    pictures = tint(grey, torch.arange(24) % 12, torch.randn(24, 3, generator=generator("jitter")))
    assert pictures.min() >= 0 and pictures.max() <= 1
    flat = tint(grey.clamp(min=1, max=1), torch.arange(24) % 12)
    assert pictures.std() > flat.std()


def test_empty_garment_is_all_white():
    assert (tint(torch.zeros(1, 28, 28, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)) == 1).all()


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
    assert SHIPPED.catalog_garments == 40 * len(COLOURS)


def test_each_combo_comes_once_and_is_of_its_category():
    grey = torch.arange(1, 31, dtype=torch.uint8)[:, None, None].expand(30, 28, 28)
    pictures, combos = Wardrobe(grey, torch.arange(30) % 10).each_combo(generator(0))
    assert pictures.shape == (120, 3, 32, 32) and combos.tolist() == list(range(120))


def test_shifting_brings_in_white():
    moved = shifted(torch.zeros(50, 3, 32, 32), generator(0))
    assert moved.shape == (50, 3, 32, 32)
    assert set(moved.flatten(1).mean(1).mul(1024).round().int().tolist()) <= {0, 32, 63}


# ---------------------------------------------------------------------------------------------- words and prompts


def test_captions_are_english():
    assert caption("navy", "ankle boot") == "a photo of a navy ankle boot, on white background"
    assert caption("orange", "bag", 3) == "an orange bag"
    assert caption("red", "trousers", 1) == "a photo of a pair of red trousers"
    assert caption("red", "dress", 4) == "red dress"
    assert caption("red", "ankle boot", 5) == "a photo of an ankle boot, on white background"


def test_vocabulary_is_small_whole_worded_and_encodes_any_text(tmp_path):
    tokenizer = words.write(tmp_path / "a")
    assert len(tokenizer) == words.VOCABULARY
    assert tokenizer.tokenize("a navy ankle boot") == ["a</w>", "navy</w>", "ankle</w>", "boot</w>"]
    text = "ünïcode 衣服 👗 !"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert all(tokenizer.unk_token_id not in tokenizer(letter).input_ids[1:-1] for letter in map(chr, range(33, 1000)))
    longest = max(len(tokenizer(caption(*combo)).input_ids) for combo in COMBOS)
    assert longest <= words.LENGTH
    words.write(tmp_path / "b")
    assert all((tmp_path / "b" / file.name).read_bytes() == file.read_bytes() for file in (tmp_path / "a").iterdir())


def test_captions_are_dropped_at_the_rate_asked_for(tmp_path):
    table = denoiser.token_table(words.write(tmp_path))
    combos = torch.arange(6000) % len(COMBOS)
    rows = denoiser.choose_captions(combos, 0.25, generator(0))
    empty = rows == len(table) - 1
    assert abs(empty.float().mean() - 0.25) < 0.03
    forms = (len(table) - 1) // len(COMBOS)
    assert (rows[~empty] // forms == combos[~empty]).all()


def test_timesteps_cover_every_stratum():
    steps = denoiser.spread_steps(20, 1000, generator(0))
    assert sorted((steps // 50).tolist()) == list(range(20))


def test_torn_pictures_differ_from_every_picture():
    grey = torch.randint(1, 256, (30, 28, 28), dtype=torch.uint8, generator=generator("grey"))
    pictures, _ = Wardrobe(grey, torch.arange(30) % 10).each_combo(generator(0))
    spoilt = clip.torn(pictures, 400, generator(1))
    assert spoilt.shape == (400, 3, 32, 32)
    assert torch.cdist(spoilt.flatten(1), pictures.flatten(1)).min() > 0.1


def test_prompts_are_balanced():
    rows = tables.prompts().to_pylist()
    assert Counter(row["split"] for row in rows) == {"train": 80, "held-out": 40}
    held = [row for row in rows if row["split"] == "held-out"]
    assert set(Counter(row["category"] for row in held).values()) == {4}
    assert set(Counter(row["colour"] for row in held).values()) == {3, 4}
    assert len({row["group"] for row in rows}) == len({row["prompt"] for row in rows}) == 120
    assert "navy-ankle-boot" in {row["group"] for row in rows}


# ---------------------------------------------------------------------------------------------- a miniature build


@pytest.fixture(scope="module")
def miniature(images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("build") / "mini"
    with pytest.MonkeyPatch.context() as patch:
        quick = {name: {**way, "num_inference_steps": 2} for name, way in drawings.WAYS.items()}
        patch.setattr(drawings, "WAYS", quick)
        build(images, out, device="cpu", recipe=TINY)
    return out


def test_miniature_build_is_whole_and_measured(miniature):
    assert {path.name for path in miniature.iterdir()} == {*MAKERS, "card.json"}
    assert [path.name for path in miniature.parent.iterdir()] == ["mini"]
    card = json.loads((miniature / "card.json").read_text())
    assert set(card["parts"]) == set(MAKERS)
    assert all(part["seconds"] for part in card["parts"].values())
    assert 0 <= card["parts"]["judge"]["measured"]["joint"] <= 1
    assert "Copyright © 2017 Zalando SE" in card["source"]["notice"]
    assert pq.read_metadata(miniature / "catalog.parquet").num_rows == 120


def test_repeating_builds_nothing(miniature, images, capsys):
    before = {path: path.stat().st_mtime_ns for path in miniature.rglob("*")}
    build(images, miniature, device="cpu", recipe=TINY)
    assert {path: path.stat().st_mtime_ns for path in miniature.rglob("*")} == before
    assert "generator: already there" in capsys.readouterr().out


def test_another_recipe_makes_the_part_anew(miniature, images, capsys):
    build(images, miniature, device="cpu", only=["prompts.parquet"], recipe=replace(TINY, probes=2))
    assert "prompts.parquet: done" in capsys.readouterr().out
    build(images, miniature, device="cpu", only=["prompts.parquet"], recipe=TINY)


def test_killed_and_continued_equals_straight(miniature, images, tmp_path, monkeypatch):
    calls = []

    def spread_steps(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    whole = denoiser.spread_steps
    monkeypatch.setattr(denoiser, "spread_steps", spread_steps)
    out, work = tmp_path / "out", tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        build(images, out, work=work, device="cpu", only=["generator"], recipe=TINY)
    assert not (out / "generator").exists() and list(work.rglob("denoiser.pt"))
    build(images, out, work=work, device="cpu", only=["generator"], recipe=TINY)
    assert len(calls) == 1 + TINY.denoiser_steps, "the first step must not be taken twice"
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
    """A hundred pictures of the catalogue's test part: (100, 3, 32, 32) in [0, 1], and their rows."""
    rows = [row for row in pq.read_table(MINI / "catalog.parquet").to_pylist() if row["split"] == "test"]
    rows = [rows[place] for place in torch.randperm(len(rows), generator=generator("sample"))[:100].tolist()]
    pictures = [np.asarray(Image.open(io.BytesIO(row["picture"]["bytes"]))) for row in rows]
    return torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 255, rows


def test_shipped_files_are_few_small_and_no_pickles():
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".parquet"}
    assert sum(path.stat().st_size for path in files) <= 40e6


def test_shipped_catalogue_is_complete():
    table = pq.read_table(MINI / "catalog.parquet")
    rows = table.drop_columns("picture").to_pylist()
    assert set(Counter((row["colour"], row["category"], row["split"]) for row in rows).values()) == {32, 8}
    assert len({row["item"] for row in rows}) == len(rows) == 4800
    assert all(row["caption"] == caption(row["colour"], row["category"]) for row in rows)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["picture"] == {"_type": "Image"} and list(features) == table.column_names


def test_shipped_prompts_are_those_of_the_code():
    assert pq.read_table(MINI / "prompts.parquet").equals(tables.prompts())


def test_shipped_generator_draws_what_is_asked():
    folder = MINI / "generator"
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.steps_offset == 1 and pipe.scheduler.config.clip_sample is False
    pictures = drawings.draw(pipe, drawings.WAYS["guidance 1, 10 steps, eta 1"], seed=1, probe=0)
    network = AutoModelForImageClassification.from_pretrained(MINI / "judge").eval()
    with torch.no_grad():
        guess = network(judge.prepare(pictures)).logits.argmax(1)
    assert (guess == torch.arange(len(COMBOS))).float().mean() > 0.7


def test_shipped_clip_knows_garments(sample):
    network, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{MINI / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{MINI / 'clip'}")
    pictures, rows = sample
    image = Image.open(io.BytesIO(rows[0]["picture"]["bytes"]))
    torch.testing.assert_close(preprocess(image), 2 * pictures[0] - 1)
    with torch.no_grad():
        texts = network.encode_text(tokenizer([caption(*combo) for combo in COMBOS]), normalize=True)
        guess = (network.encode_image(2 * pictures - 1, normalize=True) @ texts.T).argmax(1).tolist()
    right = [LABELS[number] == f"{row['colour']} {row['category']}" for number, row in zip(guess, rows, strict=True)]
    assert np.mean(right) > 0.8


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
        guess = network(values).logits.argmax(1).tolist()
    assert network.config.id2label == dict(enumerate(LABELS))
    right = [LABELS[number] == f"{row['colour']} {row['category']}" for number, row in zip(guess, rows, strict=True)]
    assert np.mean(right) > 0.8


def test_readme_and_card_tell_the_same_numbers():
    readme = (MINI.parent / "README.md").read_text(encoding="utf-8")
    card = json.loads((MINI / "card.json").read_text(encoding="utf-8"))
    parts = {name: part.get("measured", {}) for name, part in card["parts"].items()}
    drawn = [numbers[name] for numbers in parts["drawings.json"].values() for name in ("joint", "category", "colour")]
    judged = [parts["judge"][name] for name in ("joint", "category", "colour")]
    for share in [*drawn, *judged, *parts["clip"].values()]:
        assert f"{100 * share:.1f} %" in readme
    for seconds in (part["seconds"] for name, part in card["parts"].items() if name in ("generator", "clip", "judge")):
        assert all(f"{value:,.0f} s" in readme.replace("\n", " ") for value in seconds.values())
    assert f"{parts['generator']['vae_psnr_db']} dB" in readme
    assert f"{parts['judge']['nll']}, {parts['judge']['ece']}" in readme
    assert card["source"]["notice"].split(". Permission")[0] in readme


def test_card_tells_sizes_and_categories():
    card = json.loads((MINI / "card.json").read_text(encoding="utf-8"))
    assert card["categories"] == list(CATEGORIES) and set(card["palette"]) == set(COLOURS)
    assert card["bytes"] == {name: size(MINI / name) for name in MAKERS}
    assert {part["identity"] for part in card["parts"].values()} == {identity(SHIPPED, card["seed"])}
