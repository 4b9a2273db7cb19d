"""Public reward models on tiny weights of the same names: what each gives is what its own architecture gives; wrong files are refused."""

import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fashiondpo_pipeline import testing
from fashiondpo_pipeline.errors import UserError
from fashiondpo_pipeline.experts import hpsv2, image_reward
from fashiondpo_pipeline.experts.aesthetic import Aesthetic
from fashiondpo_pipeline.experts.hpsv2 import HPSv2
from fashiondpo_pipeline.experts.image_reward import ImageReward
from fashiondpo_pipeline.experts.pickscore import PickScore
from fashiondpo_pipeline.experts.tower import Tower
from fashiondpo_pipeline.experts.weights import Place, read_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def picture(seed, size=(20, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def loaded(expert):
    expert.load("cpu", None)
    return expert


def refused(call, *arguments, **options):
    with pytest.raises(UserError) as problem:
        call(*arguments, **options)
    return str(problem.value)


@pytest.fixture
def rows(tiny_clip):
    pictures = [picture(seed) for seed in range(4)]
    vectors = Tower(f"local-dir:{tiny_clip}").pictures(pictures)
    return [{"group": f"g{n}", "candidate": 0, "prompt": prompt, "picture": pictures[n], "embedding": vectors[n]}
            for n, prompt in enumerate(["a red bag", "a blue boot", "a red bag", "a long green evening dress"])]


# -- files of weights


def test_weights_are_read_from_safetensors_and_from_pickles_of_tensors(tmp_path):
    state = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, tmp_path / "c.pt")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "b.pth", "c.pt", "old.pth"):
        found = read_weights(Place(str(tmp_path / name), "head"))
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


class Evil:
    def __reduce__(self):
        return sys.exit, (7,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"weight": Evil()}, protocol=2))
    assert refused(read_weights, Place(str(path), "aesthetic head")) == (
        f"aesthetic head: {path} holds something other than weights, and reading such a pickle can run code: "
        "use a .safetensors, or a file of plain tensors")


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth"])
def test_a_file_that_was_cut_off_is_named(tmp_path, name):
    state, path = {"weight": torch.ones(1, 500)}, tmp_path / name
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:700])
    message = refused(read_weights, Place(str(path), "head"))
    assert message.startswith(f"head: {path} is cut off or damaged (") and message.endswith("); get it anew")


@pytest.mark.filterwarnings("ignore")  # torch's, of what it makes of the damage
@pytest.mark.parametrize("new", [True, False])
def test_wherever_a_file_is_damaged_there_is_a_sentence_or_weights(tmp_path, new):
    torch.save({"weight": torch.ones(2, 5), "bias": torch.ones(2)}, tmp_path / "whole.pth", _use_new_zipfile_serialization=new)
    whole, path, rng = (tmp_path / "whole.pth").read_bytes(), tmp_path / "x.pth", np.random.default_rng(0)
    refusals = 0
    for _ in range(300):
        data = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(len(data), size=rng.integers(1, 4)) if data else []:
            data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            read_weights(Place(str(path), "head"))
        except UserError as problem:
            assert str(problem).startswith("head: ")
            refusals += 1
    assert refusals > 150


def test_what_is_no_state_dict_is_named(tmp_path):
    for value in (torch.ones(3), {}, {"epoch": 3}):
        torch.save(value, tmp_path / "x.pt")
        assert refused(read_weights, Place(str(tmp_path / "x.pt"), "head")) == (
            f"head: {tmp_path / 'x.pt'} is no state dict (names with tensors); save the model's state_dict()")


def test_a_file_that_is_not_there_or_is_a_folder_is_named(tmp_path):
    assert refused(read_weights, Place(str(tmp_path / "none.pth"), "head")) == (
        f"head: there is nothing at {tmp_path / 'none.pth'}; check the path (relative ones start in the working folder), "
        "or name a place on the hub as hf://OWNER/NAME@COMMIT")
    assert refused(read_weights, Place(str(tmp_path), "head")) == f"head: {tmp_path} is a folder; name the file with the weights in it"


@pytest.mark.parametrize("name", ["hf://me/heads", "hf://me/heads@main", f"hf://heads@{COMMIT}", f"hf://me/heads@{COMMIT[:7]}/x.pth"])
def test_a_place_on_the_hub_must_be_pinned_to_a_commit(name):
    assert refused(Place, name, "head") == (
        f"head '{name}': write hf://OWNER/NAME@COMMIT, with /FILE for one file; COMMIT is all 40 digits, as a branch or tag can move")


def test_a_place_on_the_hub_is_found_in_its_cache_and_without_a_network_nowhere_else(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--me--heads" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    save_file({"weight": torch.ones(1, 2)}, snapshot / "x.safetensors")
    place = Place(f"hf://me/heads@{COMMIT}/x.safetensors", "head")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file, revision, **_: str(snapshot / file))
    assert place.found() == snapshot / "x.safetensors" and place.files("head") == {}
    assert read_weights(place)["weight"].tolist() == [[1, 1]]
    assert Place(f"hf://me/others@{COMMIT}", "head").found() is None
    assert Place(f"hf://me/heads@{COMMIT}", "head").source() == ("me/heads", {"revision": COMMIT})
    assert refused(Place(f"hf://me/heads@{COMMIT}", "head").file) == f"head 'hf://me/heads@{COMMIT}': name the file too, hf://me/heads@{COMMIT}/FILE"


def test_a_hub_that_cannot_be_reached_is_said(tmp_path):
    message = refused(Place(f"hf://me/heads@{COMMIT}/x.pth", "head").file)
    assert message.startswith(f"head 'hf://me/heads@{COMMIT}/x.pth' cannot be loaded (")
    assert message.endswith("; offline, get it where there is a network and name the local path, or copy the hub's cache and set HF_HOME")


# -- aesthetic


def linear_head(path, width=16, seed=0):
    torch.manual_seed(seed)
    torch.save(torch.nn.Linear(width, 1).state_dict(), path)
    return path


def improved_head(path, width=16):
    """(file, the network) of the improved predictor: 1024, 128, 64, 16, 1, dropouts between."""
    from torch.nn import Dropout, Linear, Sequential

    torch.manual_seed(0)
    net = torch.nn.Module()
    net.layers = Sequential(Linear(width, 1024), Dropout(0.2), Linear(1024, 128), Dropout(0.2), Linear(128, 64), Dropout(0.1), Linear(64, 16),
                            Linear(16, 1))
    torch.save(net.state_dict(), path)
    return path, net.layers.eval()


def test_the_linear_head_is_weight_times_embedding_plus_bias(tmp_path):
    torch.save({"weight": torch.tensor([[1.0, -2.0, 0.5]]), "bias": torch.tensor([3.0])}, tmp_path / "head.pth")
    expert = loaded(Aesthetic(str(tmp_path / "head.pth")))
    assert expert.tower == ("ViT-L-14-quickgelu", "openai") and expert.files() == {"head": tmp_path / "head.pth"}
    assert expert([{"embedding": np.array([0.6, 0.0, 0.8], np.float32)}]) == pytest.approx([4.0])  # 0.6 + 0.4 + 3


def test_the_improved_head_is_its_network(tmp_path, rows):
    path, net = improved_head(tmp_path / "head.pth")
    with torch.no_grad():
        wanted = net(torch.from_numpy(np.stack([row["embedding"] for row in rows])))[:, 0]
    assert loaded(Aesthetic(str(path)))(rows) == pytest.approx(wanted.tolist(), abs=1e-6)


def test_aesthetic_keeps_the_contract(tmp_path, tiny_clip, rows):
    for path in (linear_head(tmp_path / "a.pth"), improved_head(tmp_path / "b.pth")[0]):
        testing.check_expert(Aesthetic(str(path), f"local-dir:{tiny_clip}"), rows)


def test_a_head_of_another_width_is_refused(tmp_path, tiny_clip, rows):
    expert = loaded(Aesthetic(str(linear_head(tmp_path / "a.pth", width=768)), f"local-dir:{tiny_clip}"))
    assert refused(expert, rows) == (
        f"aesthetic head '{tmp_path / 'a.pth'}' reads 768 numbers, but the tower local-dir:{tiny_clip} gives 16: "
        "name the tower that the head was trained on in `model` and `pretrained`")


def test_a_head_with_other_names_is_refused(tmp_path):
    torch.save({"fc.weight": torch.ones(1, 4), "fc.bias": torch.ones(1)}, tmp_path / "x.pth")
    expert = Aesthetic(str(tmp_path / "x.pth"))
    assert refused(expert.load, "cpu", None) == (
        f"aesthetic head: '{tmp_path / 'x.pth'}' is no head that is known here (it has fc.bias, fc.weight, ...): "
        "it must have `weight` and `bias`, or `layers.0` to `layers.7`")
    torch.save({f"layers.{n}.{part}": torch.ones(1) for n in (0, 3, 6, 9, 11) for part in ("weight", "bias")}, tmp_path / "x.pth")
    assert refused(expert.load, "cpu", None).endswith("; the variants with ReLU are not read")


def test_a_head_whose_layers_do_not_fit_is_refused(tmp_path):
    path, net = improved_head(tmp_path / "head.pth")
    state = {f"layers.{name}": value for name, value in net.state_dict().items()} | {"layers.2.weight": torch.ones(128, 1000)}
    torch.save(state, path)
    assert refused(Aesthetic(str(path)).load, "cpu", None) == (
        f"aesthetic head: '{path}' does not fit together (layers.0.weight is 1024x16); get it anew")


# -- pickscore


@pytest.fixture(scope="module")
def tiny_pickscore(tmp_path_factory):
    """A transformers CLIP of random weights with its processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("models") / "pickscore"
    tokenizer = testing.tiny_tokenizer(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8}, projection_dim=8)).save_pretrained(folder)
    see = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image_processor=see, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_pickscore_is_the_models_own_logit_of_picture_and_prompt(tiny_pickscore, rows):
    from transformers import CLIPModel, CLIPProcessor

    net, processor = CLIPModel.from_pretrained(tiny_pickscore).eval(), CLIPProcessor.from_pretrained(tiny_pickscore)
    inputs = processor(images=[row["picture"] for row in rows], text=[row["prompt"] for row in rows], padding=True, truncation=True,
                       max_length=16, return_tensors="pt")
    with torch.no_grad():
        wanted = net(**inputs).logits_per_image.diagonal()
    assert loaded(PickScore(str(tiny_pickscore)))(rows) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert np.ptp(wanted.numpy()) > 0.01


def test_pickscore_keeps_the_contract_and_says_how_it_sees(tiny_pickscore, rows):
    expert = PickScore(str(tiny_pickscore))
    testing.check_expert(expert, rows)
    assert expert.files() == {"model": tiny_pickscore, "processor": tiny_pickscore}
    assert '"shortest_edge": 16' in expert.preprocessing


def test_a_model_that_lacks_weights_is_refused_before_random_ones_are_scored_with(tiny_pickscore, tmp_path):
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(tiny_pickscore, tmp_path / "half")
    state = load_file(tmp_path / "half" / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "half" / "model.safetensors", {"format": "pt"})
    assert refused(PickScore(str(tmp_path / "half")).load, "cpu", None) == (
        f"pickscore model '{tmp_path / 'half'}' is not a whole CLIPModel: 1 weights are missing, such as visual_projection.weight")


def test_a_model_that_is_not_there_or_none_is_named(tmp_path, tiny_pickscore):
    assert refused(PickScore("models/pick").load, "cpu", None) == (
        "pickscore model: there is nothing at models/pick; check the path (relative ones start in the working folder), "
        "or name a place on the hub as hf://OWNER/NAME@COMMIT")
    assert refused(PickScore(str(tmp_path)).load, "cpu", None).startswith(f"pickscore model '{tmp_path}' cannot be loaded (")
    hub = f"hf://me/none@{COMMIT}"
    assert refused(PickScore(hub).load, "cpu", None).startswith(f"pickscore model '{hub}' cannot be loaded (")
    assert PickScore(hub).files() == {}


# -- HPS v2


@pytest.fixture
def tiny_hps(tiny_clip, tmp_path):
    """(weights as HPS v2's are wrapped, the open_clip network that they are of)."""
    import open_clip

    torch.manual_seed(5)
    net = open_clip.create_model(f"local-dir:{tiny_clip}", load_weights=False).eval()
    torch.save({"state_dict": net.state_dict()}, tmp_path / "HPS.pt")
    return tmp_path / "HPS.pt", net


def test_hpsv2_is_the_cosine_in_its_own_network(tiny_hps, tiny_clip, rows):
    import open_clip

    path, net = tiny_hps
    with torch.no_grad():
        seen = net.encode_image(torch.stack([hpsv2.see(row["picture"], 16) for row in rows]), normalize=True)
        said = net.encode_text(open_clip.get_tokenizer(f"local-dir:{tiny_clip}")([row["prompt"] for row in rows]), normalize=True)
    assert loaded(HPSv2(str(path), f"local-dir:{tiny_clip}"))(rows) == pytest.approx((seen * said).sum(-1).tolist(), abs=1e-6)


def test_hpsv2_keeps_the_contract(tiny_hps, tiny_clip, rows):
    testing.check_expert(HPSv2(str(tiny_hps[0]), f"local-dir:{tiny_clip}"), rows)


def test_hpsv2_sees_the_whole_picture_with_black_beside_it():
    white, black = ([(shade - mean) / std for mean, std in zip(hpsv2.MEAN, hpsv2.STD, strict=True)] for shade in (1, 0))
    found = hpsv2.see(Image.new("RGB", (8, 4), "white"), 4)  # (3, 4, 4)
    assert found.shape == (3, 4, 4)
    for row, shade in enumerate((black, white, white, black)):
        assert found[:, row].T.tolist() == [pytest.approx(shade, abs=1e-5)] * 4
    assert hpsv2.see(Image.new("RGB", (4, 400)), 16).shape == (3, 16, 16)


def test_weights_of_another_network_are_refused(tiny_hps, tiny_clip, tmp_path):
    state = {name: value for name, value in tiny_hps[1].state_dict().items() if name != "logit_scale"}
    torch.save({"state_dict": state | {"extra": torch.ones(1), "text_projection": torch.ones(3, 4)}}, tmp_path / "x.pt")
    assert refused(HPSv2(str(tmp_path / "x.pt"), f"local-dir:{tiny_clip}").load, "cpu", None) == (
        f"hpsv2 weights: the weights in '{tmp_path / 'x.pt'}' are not those of a local-dir:{tiny_clip} "
        "(1 missing, such as logit_scale; 1 not known, such as extra; text_projection is 3x4 instead of 16x16)")
    assert refused(HPSv2(str(tmp_path / "x.pt"), "ViT-Z").load, "cpu", None).startswith("hpsv2 model 'ViT-Z' cannot be made (")


# -- ImageReward


def image_reward_state(vocabulary, wide=128, hidden=64, layers=2):
    """Random weights under the names of ImageReward.pt, with what it holds beside."""
    random, state = torch.Generator().manual_seed(3), {}

    def add(name, *shape):
        state[name] = torch.randn(shape, generator=random) * 0.2

    def linear(name, rows, columns):
        add(f"{name}.weight", rows, columns)
        add(f"{name}.bias", rows)

    def norm(name, width):
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=random) * 0.1
        add(f"{name}.bias", width)

    eye = "blip.visual_encoder"
    add(f"{eye}.cls_token", 1, 1, wide)
    add(f"{eye}.pos_embed", 1, 5, wide)
    add(f"{eye}.patch_embed.proj.weight", wide, 3, 8, 8)
    add(f"{eye}.patch_embed.proj.bias", wide)
    norm(f"{eye}.norm", wide)
    for n in range(layers):
        block = f"{eye}.blocks.{n}"
        norm(f"{block}.norm1", wide)
        norm(f"{block}.norm2", wide)
        linear(f"{block}.attn.qkv", 3 * wide, wide)
        linear(f"{block}.attn.proj", wide, wide)
        linear(f"{block}.mlp.fc1", 96, wide)
        linear(f"{block}.mlp.fc2", wide, 96)
    text = "blip.text_encoder"
    add(f"{text}.embeddings.word_embeddings.weight", vocabulary, hidden)
    add(f"{text}.embeddings.position_embeddings.weight", 40, hidden)
    norm(f"{text}.embeddings.LayerNorm", hidden)
    for n in range(layers):
        layer = f"{text}.encoder.layer.{n}"
        for kind, width in (("attention", hidden), ("crossattention", wide)):
            linear(f"{layer}.{kind}.self.query", hidden, hidden)
            linear(f"{layer}.{kind}.self.key", hidden, width)
            linear(f"{layer}.{kind}.self.value", hidden, width)
            linear(f"{layer}.{kind}.output.dense", hidden, hidden)
            norm(f"{layer}.{kind}.output.LayerNorm", hidden)
        linear(f"{layer}.intermediate.dense", 80, hidden)
        linear(f"{layer}.output.dense", hidden, 80)
        norm(f"{layer}.output.LayerNorm", hidden)
    for n, (rows, columns) in zip((0, 2, 4, 6, 7), ((1024, hidden), (128, 1024), (64, 128), (16, 64), (1, 16)), strict=True):
        linear(f"mlp.layers.{n}", rows, columns)
    linear("blip.vision_proj", 4, wide)
    linear("blip.text_proj", 4, hidden)
    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    return state


def image_reward_by_hand(state, seen, ids, mask):
    """The authors' forward on one picture (3, 16, 16) and one prompt, from their names; a number."""
    from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention

    def dense(name, x):
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q, k, v, bias=None):
        split = [x.unflatten(-1, (-1, 64)).transpose(0, 1) for x in (q, k, v)]  # (heads, n, 64)
        return scaled_dot_product_attention(*split, attn_mask=bias).transpose(0, 1).flatten(1)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    patches = conv2d(seen[None], state[f"{eye}.patch_embed.proj.weight"], state[f"{eye}.patch_embed.proj.bias"], stride=8)[0].flatten(1).T
    x = torch.cat([state[f"{eye}.cls_token"][0], patches]) + state[f"{eye}.pos_embed"][0]  # (5, wide)
    for n in range(2):
        block = f"{eye}.blocks.{n}"
        x = x + dense(f"{block}.attn.proj", attend(*dense(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)))
        x = x + dense(f"{block}.mlp.fc2", gelu(dense(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    looked = norm(f"{eye}.norm", x, 1e-6)
    y = state[f"{text}.embeddings.word_embeddings.weight"][ids] + state[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    y = norm(f"{text}.embeddings.LayerNorm", y, 1e-12)
    for n in range(2):
        layer = f"{text}.encoder.layer.{n}"
        for kind, other, bias in (("attention", None, mask.bool()[None]), ("crossattention", looked, None)):
            at = f"{layer}.{kind}"
            over = y if other is None else other
            found = attend(dense(f"{at}.self.query", y), dense(f"{at}.self.key", over), dense(f"{at}.self.value", over), bias)
            y = norm(f"{at}.output.LayerNorm", dense(f"{at}.output.dense", found) + y, 1e-12)
        y = norm(f"{layer}.output.LayerNorm", dense(f"{layer}.output.dense", gelu(dense(f"{layer}.intermediate.dense", y))) + y, 1e-12)
    value = y[0]
    for n in (0, 2, 4, 6, 7):
        value = dense(f"mlp.layers.{n}", value)
    return (float(value) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def tiny_image_reward(tmp_path_factory):
    """(file of weights, folder of a BERT tokenizer, the weights)."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("models") / "bert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "long", "green", "evening", "dress", "bag", "boot"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    state = image_reward_state(len(words))
    torch.save(state, folder / "ImageReward.pt")
    return folder / "ImageReward.pt", folder, state


def test_image_reward_is_the_authors_forward(tiny_image_reward, rows):
    path, tokenizer, state = tiny_image_reward
    expert = loaded(ImageReward(str(path), str(tokenizer)))
    found = expert(rows)
    ids = {"a": 5, "red": 6, "blue": 7, "long": 8, "green": 9, "evening": 10, "dress": 11, "bag": 12, "boot": 13}
    for row, score in zip(rows, found, strict=True):
        tokens = [2, *(ids[word] for word in row["prompt"].split()), 3]
        padded = torch.tensor(tokens + [0] * (35 - len(tokens)))
        with torch.no_grad():
            wanted = image_reward_by_hand(state, expert._see(row["picture"]), padded, (padded > 0).long())
        assert score == pytest.approx(wanted, abs=1e-4)
    assert np.ptp(found) > 0.01


def test_image_reward_keeps_the_contract(tiny_image_reward, rows):
    path, tokenizer, _ = tiny_image_reward
    expert = ImageReward(str(path), str(tokenizer))
    testing.check_expert(expert, rows)
    assert expert.files() == {"weights": path, "tokenizer": tokenizer}


def test_image_reward_sees_the_middle_square(tiny_image_reward):
    path, tokenizer, _ = tiny_image_reward
    expert = loaded(ImageReward(str(path), str(tokenizer)))
    picture = Image.new("RGB", (48, 16), "black")
    picture.paste("white", (16, 0, 32, 16))
    seen = expert._see(picture)
    assert seen.shape == (3, 16, 16)
    assert seen[:, 8, 8].tolist() == pytest.approx([(1 - mean) / std for mean, std in zip(image_reward.MEAN, image_reward.STD, strict=True)])


def test_weights_that_are_not_image_rewards_are_refused(tiny_image_reward, tmp_path):
    _, tokenizer, state = tiny_image_reward
    torch.save({"weight": torch.ones(1)}, tmp_path / "x.pt")
    assert refused(ImageReward(str(tmp_path / "x.pt"), str(tokenizer)).load, "cpu", None) == (
        f"image_reward weights: the weights in '{tmp_path / 'x.pt'}' are not ImageReward's (blip.visual_encoder, blip.text_encoder, mlp)")
    torch.save({name: value for name, value in state.items() if not name.endswith("blocks.1.attn.qkv.bias")}, tmp_path / "x.pt")
    assert refused(ImageReward(str(tmp_path / "x.pt"), str(tokenizer)).load, "cpu", None) == (
        f"image_reward weights: the weights in '{tmp_path / 'x.pt'}' are not those of BLIP's vision encoder "
        "(1 missing, such as encoder.layers.1.self_attn.qkv.bias)")
