"""``import tersor.auto``: plain ``from_pretrained`` keeps compressed checkpoints packed, on our kernels.

Importing this module replaces, for the rest of the process, what transformers does with ``quant_method``
compressed-tensors, gptq and awq. Checkpoints that our layers hold (integer weights of 2 to 8 bits, symmetric or not,
groups of a multiple of 32 columns or one per channel, exact or dynamic int8 activations, fp32, bf16 or fp16 scales)
load onto them and stay packed: nothing is decompressed at the first forward, and neither compressed-tensors, optimum
nor gptqmodel is needed. Every other checkpoint (and any that is asked for with ``dequantize=True``) goes to the
quantizer that transformers had, after a log line that says why.

It also registers ``experts_implementation="tersor"`` for mixtures of experts: compressed experts run grouped on our
kernels whatever is chosen there; what was left uncompressed runs by transformers' grouped product.

Our own ``quant_method`` needs only ``import tersor``.
"""

from __future__ import annotations

import copy
import logging

from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers import auto as _host
from transformers.quantizers.base import HfQuantizer

from .experts import experts_forward
from .integrations.transformers import TersorConfig, TersorQuantizer, register
from .io import plan as _plan
from .io.errors import CheckpointError, Unsupported
from .io.shards import open_files as _open_files

logger = logging.getLogger(__name__)

METHODS = ("compressed-tensors", "gptq", "awq")

_RAW, _BARE = "_tersor_raw", "_tersor_bare"


def _keeping(original: type) -> type:
    """The config class of a method, which also remembers the configuration as the checkpoint has it: the classes
    drop fields (a GPTQ override of one layer's bits, say) that decide how tensors are read."""

    class Keeping(original):
        @classmethod
        def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
            raw = copy.deepcopy(dict(config_dict))
            try:
                made = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
            except ImportError:
                # Its library is not there, and is only needed for what we do not run.
                made = cls._bare(raw), kwargs
            config, rest = made
            config.__dict__[_RAW] = raw
            return (config, rest) if return_unused_kwargs else config

        @classmethod
        def _bare(cls, raw):
            _plan.read_manifest(raw)
            config = cls.__new__(cls)
            config.quant_method = raw["quant_method"]
            config.dequantize = config.use_optimized_inference = False
            config.__dict__[_BARE] = True
            return config

        def to_dict(self):
            if self.__dict__.get(_BARE):
                return copy.deepcopy(self.__dict__[_RAW])
            made = super().to_dict()
            made.pop(_RAW, None)
            return made

    Keeping.__name__ = Keeping.__qualname__ = original.__name__  # transformers compares configs' classes by name
    Keeping.__module__ = __name__
    Keeping.original = original
    return Keeping


class PackedQuantizer(TersorQuantizer):
    """Loads what our layers hold; becomes the original quantizer for the rest."""

    original: type[HfQuantizer]

    def __new__(cls, quantization_config, **kwargs):
        raw = getattr(quantization_config, _RAW, None)
        why = None
        if raw is None:
            why = "the configuration does not come from a checkpoint"
        elif getattr(quantization_config, "dequantize", False):
            why = "dequantize=True asks for dense weights"
        else:
            try:
                _plan.read_manifest(raw)
            except Unsupported as error:
                why = str(error)
        if why is not None:
            return _delegate(cls.original, quantization_config, kwargs, why)
        return super().__new__(cls)

    def __init__(self, quantization_config, **kwargs):
        self._given = (quantization_config, dict(kwargs))
        super().__init__(TersorConfig(getattr(quantization_config, _RAW)), **kwargs)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            manifest = _plan.read_manifest(self.quantization_config.manifest)
            try:
                _plan.begin(model, _plan.plan_load(model, _open_files(checkpoint_files), manifest))
                return
            except Unsupported as error:
                why = str(error)
        else:
            why = f"the weights are not in safetensors files ({checkpoint_files})"
        # What the files hold shows only now: go on as the quantizer that transformers would have made.
        config, options = self._given
        other = _delegate(self.original, config, options, why)
        other.validate_environment(device_map=kwargs.get("device_map"))
        self.__dict__.clear()
        self.__dict__.update(other.__dict__)
        self.__class__ = type(other)
        self._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)


def _delegate(original: type[HfQuantizer], config, options: dict, why: str) -> HfQuantizer:
    logger.warning("tersor leaves this checkpoint to %s: %s", original.__name__, why)
    return original(config, **options)


def _install() -> None:
    register()
    ExpertsInterface.register("tersor", experts_forward)
    for method in METHODS:
        quantizer = _host.AUTO_QUANTIZER_MAPPING[method]
        if isinstance(quantizer, type) and issubclass(quantizer, PackedQuantizer):
            continue
        made = type("PackedQuantizer", (PackedQuantizer,), {"original": quantizer, "__module__": __name__,
                                                            "__doc__": PackedQuantizer.__doc__})
        _host.AUTO_QUANTIZER_MAPPING[method] = made
        _host.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _keeping(_host.AUTO_QUANTIZATION_CONFIG_MAPPING[method])


_install()

__all__ = ["CheckpointError", "METHODS", "PackedQuantizer"]
