"""OpenVINO's compressed-weight product. One graph holds several copies, so a product carries no call from Python."""

from __future__ import annotations

from .base import CHECKED_ROWS, EXACT, INT8, Contender, Unavailable, distinct_codes

ABOUT = "OpenVINO CPU plugin, u4 weights of group 128; dq: dynamic quantization of activations to int8"
GROUP = 128


def variants(options):
    return ["openvino u4", "openvino u4 dq"]


def available():
    try:
        import openvino
    except ImportError as error:
        raise Unavailable(f"openvino does not import: {error}") from error
    return {"openvino": openvino.__version__}


class U4(Contender):
    def __init__(self, k, n, dynamic, options):
        import numpy as np
        import openvino

        self.k, self.n, self.dynamic = k, n, dynamic
        self.activations = INT8 if dynamic else EXACT
        groups = k // GROUP
        self.nbytes = n * k // 2 + n * groups * 5 // 2
        self.copies = options.copies(self.nbytes)
        # A pass of many tokens is bound by arithmetic; fewer copies, still past the cache, keep it short.
        self.few = max(2, min(self.copies, -(-self.copies // 4)))
        self.scales = (np.random.default_rng(1).random((n, groups, 1)) * 0.01 + 0.001).astype(np.float16)
        self.core = openvino.Core()
        native = "BF16" in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self.precision = "bf16" if native and not dynamic else "f32"
        self._built, self._held = (None, None), []

    def _model(self, copies):
        import numpy as np
        import openvino
        from openvino import opset13 as opset

        shape = [self.n, self.k // GROUP, GROUP]
        zeros = np.full((self.n * shape[1] + 1) // 2, 0x88, np.uint8)
        x = opset.parameter([-1, self.k], np.float32, name="x")
        self._held, results = [zeros], []  # constants refer to these arrays
        for codes in distinct_codes(self.n * self.k // 2, copies):
            self._held.append(codes)
            w = opset.convert(opset.constant(openvino.Tensor(codes, openvino.Shape(shape), openvino.Type.u4)), "f16")
            zero = opset.constant(openvino.Tensor(zeros, openvino.Shape([*shape[:2], 1]), openvino.Type.u4))
            w = opset.multiply(opset.subtract(w, opset.convert(zero, "f16")), opset.constant(self.scales))
            w = opset.reshape(w, opset.constant(np.array([self.n, self.k], np.int64)), False)
            results.append(opset.result(opset.matmul(x, opset.convert(w, "f32"), False, True)))
        return openvino.Model(results, [x], "products")

    def _request(self, copies, threads):
        if self._built[0] != (copies, threads):
            self._built = None, None
            compiled = self.core.compile_model(self._model(copies), "CPU", {
                "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": self.precision,
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP if self.dynamic else 0,
            })
            self._built = (copies, threads), compiled.create_infer_request()
        return self._built[1]

    def _bind(self, m, copies, threads):
        import numpy as np
        import openvino

        request = self._request(copies, threads)
        x = np.random.default_rng(m).standard_normal((m, self.k), dtype=np.float32)
        request.set_input_tensor(openvino.Tensor(x))
        return request, x

    def calls(self, m, threads):
        copies = self.copies if m < 256 else self.few
        request, _ = self._bind(m, copies, threads)
        return [request.infer], copies

    def sample(self, m, threads):
        import numpy as np

        request, x = self._bind(m, self.copies, threads)
        request.infer()
        y = request.get_output_tensor(0).data[:, :CHECKED_ROWS]
        codes = next(distinct_codes(self.n * self.k // 2, 1)).reshape(self.n, -1)[:CHECKED_ROWS]
        w = np.stack((codes & 15, codes >> 4), -1).reshape(CHECKED_ROWS, -1, GROUP).astype(np.float64) - 8
        w *= self.scales[:CHECKED_ROWS]
        return x.astype(np.float64), y.astype(np.float64), w.reshape(CHECKED_ROWS, self.k)


def make(variant, k, n, options):
    return U4(k, n, variant.endswith("dq"), options)
