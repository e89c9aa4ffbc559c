"""bitsandbytes' nf4 product, exact activations."""

from __future__ import annotations

from .base import TorchContender, Unavailable, torch_dtype

ABOUT = "bitsandbytes.matmul_4bit, nf4, block 64"
BLOCK = 64


def variants(options):
    dtypes = dict.fromkeys((options.dtype,) if options.quick else (options.dtype, "fp32"))
    return [f"bitsandbytes nf4 {dtype}" for dtype in dtypes]


def available():
    try:
        import bitsandbytes
        import torch
    except ImportError as error:
        raise Unavailable(f"bitsandbytes does not import: {error}") from error
    return {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}


class NF4(TorchContender):
    def __init__(self, k, n, dtype, options):
        import bitsandbytes
        import torch
        from bitsandbytes import functional

        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).mul_(k**-0.5).to(dtype)
        codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        self._rows = functional.dequantize_4bit(codes, state)[:64].clone()
        # With AVX512-BF16 its own Linear4bit repacks the weight and takes a fused kernel; so does this.
        fused = getattr(functional, "has_avx512bf16", lambda: False)()
        if fused and dtype is torch.bfloat16 and hasattr(functional, "_convert_weight_packed_for_cpu"):
            codes, state = functional._convert_weight_packed_for_cpu(codes, state)
        elif fused and dtype is torch.float32:
            raise Unavailable("the fused kernel of this machine takes bf16")
        self.nbytes = codes.numel() * codes.element_size() + state.absmax.numel() * state.absmax.element_size()
        copies = options.copies(self.nbytes)
        super().__init__(k, n, dtype, [(codes.clone(), state) for _ in range(copies)])
        self._multiply = bitsandbytes.matmul_4bit

    def product(self, x, weight):
        return self._multiply(x, weight[0], quant_state=weight[1])

    def rows(self, count):
        return self._rows[:count]


def make(variant, k, n, options):
    return NF4(k, n, torch_dtype(variant.rsplit(" ", 1)[1]), options)
