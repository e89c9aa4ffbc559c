"""`load`: a checkpoint of any of the four containers onto our layers, still packed."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from .errors import CheckpointError
from .plan import read_manifest
from .shards import CONFIG, open_directory, read_json


def load(path: str | os.PathLike, dtype=None, device_map=None, **options) -> nn.Module:
    """Load a compressed model for inference: compressed-tensors, GPTQ, AWQ, or our own container.

    ``path``: a local directory, or the name of a model on the Hub. ``dtype``: of activations and uncompressed
    parameters (default: the checkpoint's); stored tensors keep theirs. ``device_map`` and other options go to
    transformers' ``from_pretrained``.

    Every file is verified before it is used: CheckpointError (a ValueError) names the file, the tensor or the field,
    what was found and what is accepted. Nothing is ever initialised at random.
    """
    import transformers

    from ..integrations.transformers import ENVELOPE, METHOD, register

    register()
    directory = _local(path, options)
    raw = read_json(directory / CONFIG)
    where = f"{directory / CONFIG}: quantization_config"
    if raw.get("quantization_config") is None:
        raise CheckpointError(f"{where}: not there; this is not a compressed checkpoint, and transformers loads it")
    manifest = read_manifest(raw["quantization_config"], where)
    open_directory(directory)
    # What transformers refuses in a config may be of any exception type; it is the file's fault each time.
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=options.get("trust_remote_code"))
    except Exception as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error
    config.quantization_config = {"quant_method": METHOD, ENVELOPE: manifest.raw}
    kind = _model_class(config, directory, options)
    model, info = kind.from_pretrained(directory, config=config, dtype=dtype or "auto", device_map=device_map,
                                       output_loading_info=True, use_safetensors=True, **options)
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            first = sorted(map(str, info[what]))[0]
            raise CheckpointError(f"{directory}: {what.replace('_', ' ')}: {first}")
    return model


def _local(path: str | os.PathLike, options: dict) -> Path:
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists() or isinstance(path, os.PathLike) or str(path).count("/") != 1 or str(path)[0] in "./~":
        raise CheckpointError(f"{path}: found no such directory, accepted is a model directory, or the name of a model "
                              "on the Hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), revision=options.pop("revision", None), token=options.pop("token", None),
                                      allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{path}: neither a directory nor a model on the Hub that can be read ({error})") from error


def _model_class(config, directory: Path, options: dict):
    import transformers

    names = config.architectures or []
    if getattr(config, "auto_map", None) and options.get("trust_remote_code"):
        return transformers.AutoModelForCausalLM
    kind = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    if names:
        raise CheckpointError(f"{directory / CONFIG}: architectures: found {names!r}, accepted is a model of "
                              f"transformers {transformers.__version__}")
    return transformers.AutoModelForCausalLM
