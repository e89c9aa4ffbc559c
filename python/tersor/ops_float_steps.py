"""Steps before activations that are rounded to small floats: on the CPU both happen in the memory of the thread that
rounds a row, in float32, as `ops_fused` has it for integers. The transformed values are never written anywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C, ops_round
from .op_checks import CODE, as_rows, fail
from .ops_fused import Producer, _Prepared


class SteppedRound:
    """`ops_round.float_round` of what a producer makes of an input, which `x.dtype` does not round in between.

    Called with ``x [..., k]`` on the CPU and the gate's second input where there is one; gives the rounded values in
    x's dtype. A group in which the transformed input is beyond that dtype is NaN, as one with Inf. float64 goes through
    torch. ValueError where the producer does not fit ``x``.
    """

    def __init__(self, producer: Producer, element: str, scale: str, group: int):
        self.producer, self.how = producer, (element, scale, group)
        self._checked: tuple | None = None
        self._prepared: _Prepared | None = None

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if not x.is_cpu:
            fail("float_round", "x", x.device, "the CPU, for steps before it")
        k = x.shape[-1]
        seen = x.dtype, k
        if x.dtype not in CODE or not x.numel():
            self.producer.check(x, other)
            return ops_round.float_round(self.producer(x, other), *self.how)
        if self._checked != seen or not self._prepared.current():
            self.producer.check(x, other)
            self._prepared, self._checked = _Prepared(self.producer, k, 16, 32, 1.0, True, None), seen
        elif (other is not None) is not self.producer.silu_mul or other is not None and (
                other.dtype is not x.dtype or other.shape != x.shape or not other.is_cpu):
            self.producer.check(x, other)
        element, scale, group = self.how
        rows, second = as_rows(x), None if other is None else as_rows(other)
        m = rows.shape[0]
        y = torch.empty(x.shape, dtype=x.dtype)
        _C.float_round(rows.data_ptr(), y.data_ptr(), CODE[x.dtype], m, k, rows.stride(0) if m > 1 else k,
                       ops_round.ELEMENTS[element], ops_round.SCALES[scale], group or max(k, 16),
                       torch.get_num_threads(), self._prepared.input, 0 if second is None else second.data_ptr(),
                       k if second is None or m == 1 else second.stride(0))
        return y


class BoundFloatFused:
    """Bound products of one rounded input (`formats.inputs.Bound`, of one format) behind a producer: the step and the
    rounding run once, the products once for each weight. Called as `ops_fused.BoundIntLinearFused` is."""

    def __init__(self, members: list, producer: Producer):
        self.members = members
        self.round = SteppedRound(producer, *members[0].format.rounding)

    def __call__(self, x: Tensor, biases: list[Tensor | None], other: Tensor | None = None) -> list[Tensor]:
        seen = self.round(x, other)
        return [member.product(seen, bias) for member, bias in zip(self.members, biases, strict=True)]
