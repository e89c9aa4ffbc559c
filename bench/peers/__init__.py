"""The contenders of bench/linear.py, one file per library; `base` says what such a file offers."""

BASELINES = ("torch_dense",)
OWN = "tersor_linear"
PEERS = ("torch_int4", "torch_dyn4", "bitsandbytes_nf4", "onnxruntime_nbits", "openvino_u4", "torchao_da8w4")
