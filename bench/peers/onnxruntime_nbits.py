"""ONNX Runtime's MatMulNBits. One graph holds several copies, so a product carries no call from Python."""

from __future__ import annotations

from .base import EXACT, INT8, CHECKED_ROWS, Contender, Unavailable, distinct_codes

ABOUT = "com.microsoft.MatMulNBits, 4 bits, fp32 inputs; accuracy_level 4 quantizes activations to int8"


def variants(options):
    if options.quick:
        return ["onnxruntime b128 acc1", "onnxruntime b128 acc4"]
    return [f"onnxruntime b{block} acc{level}" for level in (0, 1, 4) for block in (128, 32)]


def available():
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise Unavailable(f"onnxruntime and onnx are both needed: {error}") from error
    return {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}


class MatMulNBits(Contender):
    def __init__(self, k, n, block, level, options):
        import numpy as np

        self.k, self.n, self.block, self.level = k, n, block, level
        self.activations = INT8 if level == 4 else EXACT
        groups = k // block
        self.nbytes = n * k // 2 + 4 * n * groups
        self.copies = options.copies(self.nbytes)
        # A pass of many tokens is bound by arithmetic; fewer copies, still past the cache, keep it short.
        self.few = max(2, min(self.copies, -(-self.copies // 4)))
        self.scales = np.random.default_rng(1).random(n * groups, dtype=np.float32) * 0.01 + 0.001
        self._built = None, None

    def _codes(self, copies):
        return (codes.reshape(self.n, self.k // self.block, self.block // 2)
                for codes in distinct_codes(self.n * self.k // 2, copies))

    def _session(self, copies, threads):
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        if self._built[0] == (copies, threads):
            return self._built[1]
        self._built = None, None
        constants, nodes, outputs = [], [], []
        for index, codes in enumerate(self._codes(copies)):
            constants += [numpy_helper.from_array(codes, f"codes{index}"),
                          numpy_helper.from_array(self.scales, f"scales{index}")]
            nodes.append(helper.make_node(
                "MatMulNBits", ["x", f"codes{index}", f"scales{index}"], [f"y{index}"], domain="com.microsoft",
                K=self.k, N=self.n, bits=4, block_size=self.block, accuracy_level=self.level))
            outputs.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, ["m", self.n]))
        graph = helper.make_graph(nodes, "products", [helper.make_tensor_value_info("x", TensorProto.FLOAT,
                                                                                    ["m", self.k])],
                                  outputs, constants)
        model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21),
                                                                       helper.make_opsetid("com.microsoft", 1)])
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(model.SerializeToString(), settings,
                                               providers=["CPUExecutionProvider"])
        self._built = (copies, threads), session
        return session

    def _input(self, m):
        import numpy as np

        return np.random.default_rng(m).standard_normal((m, self.k), dtype=np.float32)

    def calls(self, m, threads):
        import numpy as np
        import onnxruntime

        copies = self.copies if m < 256 else self.few
        session = self._session(copies, threads)
        binding = session.io_binding()
        binding.bind_cpu_input("x", self._input(m))
        for index in range(copies):
            y = onnxruntime.OrtValue.ortvalue_from_shape_and_type([m, self.n], np.float32, "cpu")
            binding.bind_ortvalue_output(f"y{index}", y)
        return [lambda: session.run_with_iobinding(binding)], copies

    def sample(self, m, threads):
        import numpy as np

        x = self._input(m)
        y = self._session(self.copies, threads).run(["y0"], {"x": x})[0][:, :CHECKED_ROWS]
        codes = next(self._codes(1))[:CHECKED_ROWS]
        w = np.stack((codes & 15, codes >> 4), -1).reshape(CHECKED_ROWS, -1, self.block).astype(np.float64) - 8
        w *= self.scales.reshape(self.n, -1, 1)[:CHECKED_ROWS]
        return x.astype(np.float64), y.astype(np.float64), w.reshape(CHECKED_ROWS, self.k)


def make(variant, k, n, options):
    _, block, level = variant.split()
    return MatMulNBits(k, n, int(block[1:]), int(level[3:]), options)
