"""The sampling defaults that a checkpoint recommends, from its generation_config.json."""

from pathlib import Path

from ..core.checkpoint_files import read_json
from ..core.config import ModelSection
from ..core.errors import CheckpointError, InvalidRequest
from ..core.request import DefaultSampling, SamplingParams
from ..core.validation import check_sampling_ranges
from .checkpoint import GENERATION_CONFIG_FILE, resolve_model_path
from .json_fields import JsonFields

TOP_K_OFF = -1  # as in vLLM


def default_sampling(model: ModelSection) -> DefaultSampling:
    """Returns the defaults for requests to `model`, empty where its checkpoint has none or the configuration
    leaves them out. Raises CheckpointError for values that no request could have."""
    file = resolve_model_path(model.path) / GENERATION_CONFIG_FILE
    if model.generation_config == "none" or not file.exists():  # a GGUF file is no directory, and has none
        return DefaultSampling()
    try:
        defaults = _read(file)
        check_sampling_ranges(SamplingParams(**defaults.stated))
    except (InvalidRequest, CheckpointError) as error:
        place = f"{file}: " if isinstance(error, InvalidRequest) else ""
        raise CheckpointError(f"{place}{error}; model.generation_config: none leaves the file out") from None
    return defaults


def _read(file: Path) -> DefaultSampling:
    """`do_sample` is not looked at, as in vLLM: clients say by the temperature whether tokens are drawn."""
    values = read_json(file)
    fields = JsonFields(values, str(file))
    return DefaultSampling(
        temperature=fields.optional_float("temperature"),
        top_k=0 if values.get("top_k") == TOP_K_OFF else fields.optional_int("top_k"),
        top_p=fields.optional_float("top_p"),
        min_p=fields.optional_float("min_p"),
        repetition_penalty=fields.optional_float("repetition_penalty"),
    )
