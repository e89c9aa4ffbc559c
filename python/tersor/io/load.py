"""`load`: a checkpoint of any of the four containers onto our layers, still packed."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
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
    _check_depth(raw, len(open_directory(directory).entries), directory)
    # What a model's class refuses in a config may be of any exception type; it is the file's fault each time.
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=options.get("trust_remote_code"))
        config.quantization_config = {"quant_method": METHOD, ENVELOPE: manifest.raw}
        kind = _model_class(config, directory, options)
        if not getattr(config, "auto_map", None):
            with torch.device("meta"):
                build = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
                build(copy.deepcopy(config))
    except (CheckpointError, ImportError):
        raise
    except Exception as error:
        raise CheckpointError(f"{directory / CONFIG}: {type(error).__name__}: {error}") from error
    model, info = kind.from_pretrained(directory, config=config, dtype=dtype or "auto", device_map=device_map,
                                       output_loading_info=True, use_safetensors=True, **options)
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            first = sorted(map(str, info[what]))[0]
            raise CheckpointError(f"{directory}: {what.replace('_', ' ')}: {first}")
    return model


def _check_depth(raw: dict, tensors: int, directory: Path) -> None:
    """A model has no more layers than the checkpoint has tensors: a config that says otherwise would build for ever."""
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"):
        if isinstance(raw.get(name), int) and raw[name] > tensors:
            raise CheckpointError(f"{directory / CONFIG}: {name}: found {raw[name]}, and the checkpoint has {tensors} "
                                  "tensors")


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
        return Path(snapshot_download(
            str(path), revision=options.pop("revision", None), token=options.pop("token", None),
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{path}: neither a directory nor a model on the Hub that can be read "
                              f"({error})") from error


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
