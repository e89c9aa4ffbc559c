"""Our quantizer in transformers: compressed layers load packed and are saved under standard names."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..gate import fuse_gates
from ..io import plan as planning
from ..io import own, write
from ..io.errors import CheckpointError, Unsupported
from ..io.shards import open_files
from ..norm import fuse_norms
from ..patch import link_siblings
from ..transforms.steps import KEY_TRANSFORM

METHOD = "tersor"
ENVELOPE = "container_config"


class TersorConfig(QuantizationConfigMixin):
    """Our quantization config in a model's config.

    ``manifest`` is the ``quantization_config`` of the container that the checkpoint is in, and what `to_dict` gives:
    a compressed-tensors checkpoint that is loaded and saved stays one.
    """

    def __init__(self, manifest: Mapping | None = None, **fields):
        self.quant_method = METHOD
        self.manifest = dict(manifest if manifest is not None else {"quant_method": METHOD, **fields})

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        if not isinstance(config_dict, Mapping):
            raise CheckpointError(f"quantization_config: found {type(config_dict).__name__}, accepted is an object")
        config = cls(copy.deepcopy(config_dict.get(ENVELOPE, dict(config_dict))))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict:
        return copy.deepcopy(self.manifest)

    def to_diff_dict(self) -> dict:
        return self.to_dict()

    def __iter__(self):
        yield from self.to_dict().items()


class TersorQuantizer(HfQuantizer):
    """Loads checkpoints of our container, compressed-tensors, GPTQ and AWQ onto our layers, still packed."""

    requires_calibration = True  # a config of ours describes a compressed checkpoint; `compress` makes one

    def __init__(self, quantization_config: TersorConfig, as_: str | None = None, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.as_ = as_ or str(quantization_config.manifest.get("quant_method"))

    def validate_environment(self, *args, device_map=None, **kwargs):
        devices = set(map(str, device_map.values())) if isinstance(device_map, dict) else set()
        if "disk" in devices or "cpu" in devices and len(devices) > 1:
            raise ValueError(f"device_map: found {sorted(devices)}; compressed layers do not run offloaded, accepted "
                             "are devices that hold them")

    def update_device_map(self, device_map):
        return device_map

    def get_new_dtype(self, converter, param, dtype):
        # Stored tensors keep their dtypes: a scale in another one would be another weight.
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise CheckpointError(f"checkpoint: found {checkpoint_files!r}, accepted are safetensors files")
        manifest = planning.read_manifest(self.quantization_config.manifest)
        own.declare(model, manifest)
        checkpoint = open_files(checkpoint_files)
        plan = planning.plan_load(model, checkpoint, manifest)
        for name in plan.missing:  # transformers only warns of those, and leaves what memory held
            if name.endswith(f".{KEY_TRANSFORM}"):
                raise CheckpointError(f"{checkpoint.directory}: tensor {name!r}: not in the checkpoint, and the "
                                      "configuration names it")
        planning.begin(model, plan)

    def _process_model_after_weight_loading(self, model, **kwargs):
        planning.finish(model)
        link_siblings(model)
        fuse_norms(model)
        fuse_gates(model)
        return model

    def get_state_dict_and_metadata(self, model):
        """Stored names and tensors of the model as it is now; its config says the same from here on."""
        try:
            written = write.choose(model, self.as_)
        except Unsupported:
            written = write.choose(model)
        model.config.quantization_config = TersorConfig(written.config)
        return write.state_dict(model, written), {}

    def _dequantize(self, model, dtype=None):
        raise ValueError("compressed layers are not dequantized in place; load the original model instead")

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top; the compressed weights themselves have no gradient

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Register the method; calling it again changes nothing."""
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(TersorConfig)
        auto.register_quantizer(METHOD)(TersorQuantizer)


def attach(model: nn.Module, as_: str = "auto") -> None:
    """Let a compressed model's own ``save_pretrained`` write it under standard names, in the container ``as_``.

    Nothing for models that are not transformers'.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    register()
    config = TersorConfig({"quant_method": METHOD})
    model.hf_quantizer = TersorQuantizer(config, as_)
    model.config.quantization_config = config
    model.quantization_method = METHOD
    model.is_quantized = True
    planning.untie(model, write.compressed_layers(model))


register()
