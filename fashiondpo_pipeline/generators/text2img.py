"""Any diffusers text-to-image model, by what its model_index.json says it is."""

from typing import Any

from fashiondpo_pipeline import checkpoints
from fashiondpo_pipeline.generators.diffusers_model import Options
from fashiondpo_pipeline.registry import FAMILIES


def text2img(model: str, revision: str | None = None, variant: str | None = None, config: str | None = None, **options: Any) -> Any:
    """The generator of a model: diffusers folder, `embedded:NAME`, single-file checkpoint (with `config`), or hub id.

    options: see `Options`. Raises UserError if nothing can be drawn with it.
    """
    source = checkpoints.open_source(model, revision, variant, config)
    return FAMILIES.find(source.family)(source, Options(**options))
