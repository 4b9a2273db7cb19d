"""The tables: Arrow schemas, the meaning and unit of each column in its metadata. Rows are keyed, never positional."""

import json

import pyarrow as pa

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _schema(*columns: tuple[str, pa.DataType, str], about: str) -> pa.Schema:
    fields = [pa.field(name, kind, metadata={"about": text}) for name, kind, text in columns]
    metadata = {"about": about}
    pictures = {field.name: {"_type": "Image"} for field in fields if field.type == PICTURE}
    if pictures:  # what Hugging Face `datasets` and its viewers read to show a column as pictures
        others = {field.name: _feature(field.type) for field in fields if field.type != PICTURE}
        features = {field.name: (pictures | others)[field.name] for field in fields}
        metadata["huggingface"] = json.dumps({"info": {"features": features}})
    return pa.schema(fields, metadata=metadata)


def _feature(kind: pa.DataType) -> dict:
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    name = {pa.float64(): "float64", pa.float32(): "float32", pa.string(): "string"}.get(kind, str(kind))
    return {"dtype": name, "_type": "Value"}


_GROUP = ("group", pa.string(), "key of the prompt; with `candidate` the key of a picture")
_CANDIDATE = ("candidate", pa.int16(), "number of the picture within its group, from 0")

CANDIDATES = _schema(
    _GROUP,
    _CANDIDATE,
    ("prompt", pa.string(), "what was asked for"),
    ("round", pa.int32(), "round that drew it; 0 is the base"),
    ("seed", pa.int64(), "of the CPU generator that gave x_T and every step's noise"),
    ("guidance", pa.float32(), "classifier-free guidance it was drawn with"),
    ("guidance_interval", pa.list_(pa.float32()), "part of the walk in which it acted, from 0 (noise) to 1 (picture)"),
    ("guidance_rescale", pa.float32(), "share of its contrast that was taken back"),
    ("picture", PICTURE, "PNG"),
    ("fault", pa.string(), "why it must not be used (not a number in the latent, ...); null: sound"),
    about="one row is one picture",
)


def trajectories(channels: int, height: int, width: int) -> pa.Schema:
    """One row is one candidate's saved path; latents are fp16, C order, (channels, height, width) each.

    In lists they are of no fixed size to Arrow, as pandas reads no lists of such.
    """
    latent = channels * height * width * 2
    schema = _schema(
        _GROUP,
        _CANDIDATE,
        ("steps", pa.list_(pa.int16()), "numbers of the saved steps, from 0 (noisiest)"),
        ("timesteps", pa.list_(pa.float32()), "their timesteps t, 0..1000"),
        ("x_t", pa.list_(pa.binary()), "latent before each saved step"),
        ("x_prev", pa.list_(pa.binary()), "latent after each saved step; null where it is the next saved step's x_t, or x_0"),
        ("x_0", pa.binary(latent), "the finished latent, as the VAE's decoder is given it times scaling_factor"),
        ("log_prob", pa.list_(pa.float64()), "ln p(x_prev | x_t) summed over dimensions, nats; null: no density"),
        ("error", pa.list_(pa.float32()), "mean squared error of the conditional prediction at x_t against its own x_0"),
        ("prediction", pa.list_(pa.binary()), "conditional prediction at each saved step, fp16; null: not kept"),
        about="what finetuning needs, so that it runs no reference forward",
    )
    return schema.with_metadata({**schema.metadata, b"latent_shape": json.dumps([channels, height, width]).encode()})


EMBEDDINGS = _schema(
    _GROUP,
    _CANDIDATE,
    ("embedding", pa.list_(pa.float32()), "unit vector of the picture in a CLIP tower, shared by every expert on it"),
    about="one row is one picture's embedding",
)

SCORES = _schema(
    _GROUP,
    _CANDIDATE,
    ("score", pa.float64(), "higher is better, in the expert's own unit; NaN: it cannot say"),
    ("reason", pa.string(), "why there is no score; null where there is one"),
    about="one row is one expert's opinion of one picture",
)
SCORES_WITH_REPLIES = SCORES.append(
    pa.field("reply", pa.string(), metadata={"about": "what the model answered, cut at 2,000 characters; null: no answer"})
)

SCORES_WITH_RIGHT = SCORES.append(
    pa.field("right", pa.bool_(), metadata={"about": "whether what was asked for is the expert's own first choice; null: no score"})
)


def scores_of(expert: object) -> pa.Schema:
    """The table of an expert's scores: some give a raw reply with each, some whether the picture is right."""
    return SCORES_WITH_REPLIES if getattr(expert, "replies", False) else SCORES_WITH_RIGHT if getattr(expert, "classifies", False) else SCORES


def pairs(experts: list[str]) -> pa.Schema:
    """One row is one preference; a gap column for each rewarded expert."""
    gaps = [(f"gap_{name}", pa.float32(), f"winner's normalised {name} minus the loser's") for name in experts]
    return _schema(
        _GROUP,
        ("winner", pa.int16(), "candidate number"),
        ("loser", pa.int16(), "candidate number"),
        ("winner_score", pa.float32(), "mixed normalised score"),
        ("loser_score", pa.float32(), "mixed normalised score"),
        ("margin", pa.float32(), "winner_score minus loser_score; below 0 only where labels are swapped or random"),
        *gaps,
        about="one row is one preference",
    )


SHARED_PAIRS = pairs([]).append(
    pa.field("share", pa.float64(), metadata={"about": "preference for the winner, above 0.5: 1 outright, else the share that chose it"})
)  # of imported sets in which a label is a share

REJECTS = _schema(_GROUP, ("reason", pa.string(), "why the group gave no pair"), about="one row is one group without a pair")

PICTURES = _schema(
    _GROUP,
    _CANDIDATE,
    ("prompt", pa.string(), "what was asked for"),
    ("picture", PICTURE, "PNG, JPEG or WebP, byte for byte as it came"),
    ("source", pa.string(), "what it was called where it came from: a file's name, an id; null: not known"),
    ("liked", pa.bool_(), "thumb up or down, of the picture by itself; null: not asked"),
    about="one row is one picture of a pair set",
)

PREFERENCES = _schema(
    _GROUP,
    ("first", pa.int16(), "candidate number of the picture shown first (left)"),
    ("second", pa.int16(), "candidate number of the other"),
    ("label", pa.float64(), "preference for `first`: 1 it won, 0 it lost, 0.5 a tie, between them a share; null: not labelled"),
    ("annotator", pa.string(), "who said so; null: not known"),
    ("gap", pa.float64(), "how much better the winner is, in the unit of who said so; null: not known"),
    ("source", pa.string(), "what the comparison was called where it came from; null: not known"),
    about="one row is one comparison of two pictures of a group",
)

STEPS = _schema(
    ("step", pa.int32(), "optimiser step, from 0"),
    ("epoch", pa.int32(), "pass over the groups, from 0"),
    ("loss", pa.float32(), "mean over pairs and timesteps; ln 2 = 0.693 at step 0"),
    ("margin", pa.float32(), "mean of beta times the implicit reward gap"),
    ("accuracy", pa.float32(), "share of pairs the policy orders as the reward does, against the reference; ties one half"),
    ("winner", pa.float32(), "mean change of the winner's signal against the reference (log-ratio, or minus the error's rise)"),
    ("loser", pa.float32(), "mean change of the loser's signal against the reference"),
    ("grad_norm", pa.float32(), "before clipping"),
    ("learning_rate", pa.float32(), "of this step"),
    ("beta", pa.float32(), "of this step; auto_beta and divergence move it"),
    ("divergence", pa.float32(), "from the reference over the steps that are trained on, nats a picture, estimated; null: no log-probabilities"),
    ("clipped", pa.float32(), "share of pairs with a candidate beyond ratio_clip, which gives no more gradient"),
    ("winner_error", pa.float32(), "mean change of the winner's squared error against the reference; above 0: it is drawn worse"),
    ("loser_error", pa.float32(), "mean change of the loser's squared error against the reference"),
    ("pairs", pa.int32(), "pairs times timesteps in this step"),
    ("rows", pa.int32(), "rows that went through the denoiser"),
    about="one row is one optimiser step",
)

COLUMNS = _schema(
    ("step", pa.int16(), "number of the saved step (or draw)"),
    ("timestep", pa.float32(), "its timestep t; of a draw, the mean over groups"),
    ("pairs", pa.int64(), "pairs seen in the last pass over the groups"),
    ("accuracy", pa.float32(), "share of them that the policy orders as the reward does, against the reference; ties one half"),
    ("margin", pa.float32(), "their mean margin"),
    ("winner", pa.float32(), "mean change of the winner's signal against the reference"),
    ("loser", pa.float32(), "mean change of the loser's signal against the reference"),
    about="one row is one timestep of the last pass: where the policy learns",
)

METERS = _schema(
    _GROUP,
    _CANDIDATE,
    ("brightness", pa.float32(), "mean luminance, 0..1"),
    ("contrast", pa.float32(), "standard deviation of luminance, 0..1"),
    ("saturation", pa.float32(), "mean of (max-min)/max over pixels, 0..1"),
    ("sharpness", pa.float32(), "mean absolute luminance difference of neighbours, 0..1"),
    ("edge_density", pa.float32(), "share of pixels on an edge, 0..1"),
    ("colour_entropy", pa.float32(), "entropy of the colours, 0..9 bits"),
    ("dark_pixels", pa.float32(), "share of pixels of a luminance below 0.2, 0..1"),
    about="one row is one picture's pixel statistics, watched for drift",
)
