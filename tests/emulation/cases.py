"""Inputs for every wrapper of cuda/ptx and what it must make of them, by numpy.

The kernels are in kernels/wrappers.cu. The same cases are run on the host by tests/test_emulation.py, on a GPU by
bench/record_ptx.py, and replayed by tests/test_replay.py.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

PTX = Path(__file__).resolve().parents[2] / "cuda" / "ptx"
ROUNDS = 8
LUTS = [0xEA, 0x6A, 0xC0, 0xF8, 0x96, 0x01, 0x1B, 0xD8]


@dataclasses.dataclass(frozen=True)
class Case:
    """One launcher `case_<name>(in, out, n)` over 32-bit words.

    inputs: draws the words of `in`, uint32 [any]. expected: those words to the words of `out`; for mma in
    floating point, and for approximations, a float64 array and what the tolerance is relative to beside it.
    words: of `out`. wrappers: the names in cuda/ptx that a recording of this case verifies.
    """

    name: str
    wrappers: tuple[str, ...]
    n: int
    words: int
    inputs: Callable[[np.random.Generator], np.ndarray]
    expected: Callable[[np.ndarray], np.ndarray]
    tolerance: bool = False

    def draw(self) -> np.ndarray:
        seed = sum(ord(c) * (i + 1) for i, c in enumerate(self.name))
        words = self.inputs(np.random.default_rng(seed))
        return np.ascontiguousarray(words, dtype=np.uint32)


# Headers that do not compile for every GPU; tests/test_cuda_float_products.py has the cases of their wrappers.
SOME_GPUS = ("matrix_float.h", "matrix_fp4.h", "matrix_mx.h")


def wrappers(some_gpus: bool = False) -> set[str]:
    """Names of the wrappers that the headers for all GPUs define, or those of `SOME_GPUS`."""
    names = set()
    for header in PTX.glob("*.h"):
        if (header.name in SOME_GPUS) is not some_gpus:
            continue
        text = header.read_text()
        names |= set(re.findall(r"^TERSOR_PTX [\w:<>, ]+?\b(\w+)\(", text, flags=re.MULTILINE))
    return names


# ---- 16-bit floats -------------------------------------------------------------------------------------------
SPECIAL_F16 = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00,
               0xFE01, 0x7C01, 0x6400, 0x1400, 0x3BFF]
SPECIAL_BF16 = [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F80, 0xBF80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0,
                0xFFC1, 0x7F81, 0x4300, 0x3380, 0x3F7F]
SPECIAL_F32 = [0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000,
               0x7FC00000, 0x7F800001, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x38800000, 0x387FFFFF, 0x33000000,
               0x33000001, 0x32FFFFFF, 0x3F801000, 0x3F803000, 0x3F808000, 0x3F818000, 0x7F7F8000, 0x3F807FFF]


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """float64 of the 16-bit patterns."""
    bits = bits.astype(np.uint16)
    if kind == "f16":
        with np.errstate(invalid="ignore"):
            return bits.view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def round_exact(mantissa: int, exponent: int, kind: str) -> int:
    """mantissa * 2**exponent as a 16-bit magnitude pattern, rounded to nearest even in integers."""
    fraction, lowest, infinity = (10, -14, 0x7C00) if kind == "f16" else (7, -126, 0x7F80)
    if mantissa == 0:
        return 0
    top = max(mantissa.bit_length() - 1 + exponent, lowest)
    shift = top - fraction - exponent  # mantissa in units of the last place
    if shift <= 0:
        units = mantissa << -shift
    else:
        units, rest = mantissa >> shift, mantissa & ((1 << shift) - 1)
        half = 1 << (shift - 1)
        units += rest > half or (rest == half and units & 1)
    return min(((top - lowest) << fraction) + units, infinity)


def fma_exact(a: float, b: float, c: float, kind: str) -> int:
    """The pattern of a * b + c rounded once, by exact integers."""
    with np.errstate(all="ignore"):
        approximate = np.float64(a) * np.float64(b) + np.float64(c)
    if np.isnan(approximate):
        return 0x7FFF
    if not np.isfinite([a, b, c]).all():
        return round_exact(1, 5000, kind) | (0x8000 if approximate < 0 else 0)
    (am, ad), (bm, bd), (cm, cd) = a.as_integer_ratio(), b.as_integer_ratio(), c.as_integer_ratio()
    exponent = -(ad * bd * cd).bit_length() + 1
    total = am * bm * cd + cm * ad * bd  # over the common denominator
    if total == 0:  # signs of zeros, as IEEE adds them
        return 0x8000 if np.signbit(approximate) else 0
    return round_exact(abs(total), exponent, kind) | (0x8000 if total < 0 else 0)


def _pairs(kind):
    special = SPECIAL_F16 if kind == "f16" else SPECIAL_BF16

    def inputs(rng):
        halves = rng.integers(0, 1 << 16, (3, 2, 256))
        # A third of the numbers near one another in size, so that sums cancel and round.
        near = (0x3C00 if kind == "f16" else 0x3F80) + rng.integers(-600, 600, halves.shape)
        halves = np.where(rng.random(halves.shape) < 0.35, near ^ (rng.integers(0, 2, halves.shape) << 15), halves)
        grid = np.array(special)
        count = len(grid)
        halves[0, 0, :256] = np.where(np.arange(256) < 200, grid[np.arange(256) % count], halves[0, 0, :256])
        halves[1, 0, :200] = grid[np.arange(200) // count % count]
        return (halves[:, 0] | halves[:, 1] << 16).reshape(-1)

    return inputs


def _fma(kind, operands):
    def expected(words):
        a, b, c = words.reshape(3, -1)
        out = np.zeros(a.shape, np.uint32)
        for shift in (0, 16):
            x, y, z = (decode((v >> shift) & 0xFFFF, kind) for v in (a, b, c))
            for i in range(len(a)):
                values = {"a": float(x[i]), "b": float(y[i]), "c": float(z[i]), "1": 1.0, "-1": -1.0, "-0": -0.0}
                out[i] |= np.uint32(fma_exact(*(values[o] for o in operands), kind) << shift)
        return out

    return expected


def _pack(kind):
    def expected(words):
        a, b, _ = words.reshape(3, -1)
        out = np.zeros(a.shape, np.uint32)
        for v, shift in ((a, 0), (b, 16)):
            for i, x in enumerate(v.view(np.float32)):
                out[i] |= np.uint32(fma_exact(float(x), 1.0, -0.0, kind) << shift)
        return out

    return expected


def _floats(rng):
    words = rng.integers(0, 1 << 32, (3, 256), dtype=np.uint64).astype(np.uint32)
    small = (rng.standard_normal(words.shape) * 10.0 ** rng.uniform(-8, 5, words.shape)).astype(np.float32)
    words = np.where(rng.random(words.shape) < 0.6, small.view(np.uint32), words)
    words[0, : len(SPECIAL_F32)] = words[1, 40 : 40 + len(SPECIAL_F32)] = SPECIAL_F32
    return words.reshape(-1)


def _words(n):
    return lambda rng: rng.integers(0, 1 << 32, n, dtype=np.uint64).astype(np.uint32)


def _unpack(kind):
    def expected(words):
        halves = np.stack([words & 0xFFFF, words >> 16], 1).reshape(-1)
        with np.errstate(invalid="ignore"):
            return decode(halves, kind).astype(np.float32).view(np.uint32)

    return expected


def _canonical(words):
    """NaN payloads are not part of what is compared."""
    return np.where((words & 0x7FFFFFFF) > 0x7F800000, np.uint32(0x7FFFFFFF), words)


# ---- bits ----------------------------------------------------------------------------------------------------
def _lop3(words):
    a, b, c = words.reshape(3, -1)
    out = np.zeros((len(a), 8), np.uint32)
    for j, lut in enumerate(LUTS):
        for bit in range(32):
            index = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
            out[:, j] |= (np.uint32(lut) >> index & 1) << np.uint32(bit)
    return out.reshape(-1)


def _prmt(words):
    a, b, selector = (v.astype(np.uint64) for v in words.reshape(3, -1))
    both = b << np.uint64(32) | a
    out = np.zeros(a.shape, np.uint64)
    for i in range(4):
        nibble = selector >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(255)
        byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), 255, 0).astype(np.uint64), byte)
        out |= byte << np.uint64(8 * i)
    return out.astype(np.uint32)


def _funnel(words):
    low, high, shift = (v.astype(np.uint64) for v in words.reshape(3, -1))
    return ((high << np.uint64(32) | low) >> (shift & np.uint64(31))).astype(np.uint32)


def _exponents(rng):
    x = rng.uniform(-160, 127, 768).astype(np.float32)
    x[:8] = [0, -0.0, 1, -1, -126, -127, -1000, -np.inf]
    return x.view(np.uint32)


def _exp2(words):
    """Subnormal results are 0; the tolerance is relative to the result, or to the least normal number."""
    values = np.exp2(words[:256].view(np.float32).astype(np.float64))
    values = np.where(values < 2.0**-126, 0, values)
    return np.stack([values, np.maximum(values, 2.0**-126)])


# ---- warps ---------------------------------------------------------------------------------------------------
def _rounds(limit):
    def inputs(rng):
        values = _words(ROUNDS * 64)(rng).reshape(ROUNDS, 2, 32)
        values[:, 1] = rng.integers(0, limit, (ROUNDS, 32))
        values[0, 0] |= 1  # a round in which all vote yes, one in which none does
        values[1, 0] &= ~np.uint32(1)
        return values.reshape(-1)

    return inputs


def _warp(function):
    def expected(words):
        rounds = words.reshape(ROUNDS, 2, 32)
        return np.stack([function(v, a.astype(np.int64)) for v, a in rounds]).astype(np.uint32).reshape(-1)

    return expected


LANES = np.arange(32)


def _same_argument(limit):
    def inputs(rng):
        values = _rounds(limit)(rng).reshape(ROUNDS, 2, 32)
        values[:, 1] = rng.integers(0, limit, (ROUNDS, 1))
        return values.reshape(-1)

    return inputs


def _down(values, distance):
    source = LANES + distance
    return values[np.where(source > 31, LANES, source)]


def _wide(words):
    rounds = words.reshape(ROUNDS, 2, 32)
    return rounds[:, :, (LANES + 5) % 32].reshape(-1)


# ---- matrices ------------------------------------------------------------------------------------------------
def elements(words: np.ndarray, bits: int) -> np.ndarray:
    """Patterns of `bits` bits in the words, lowest first: [..., 32 / bits]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return words[..., None] >> shifts & np.uint32((1 << bits) - 1)


def fragment_a(words: np.ndarray, bits: int) -> np.ndarray:
    """a[32 lanes][4 registers] to the matrix [16, K]; PTX ISA, matrix fragments of m16n8k*."""
    e = 32 // bits
    matrix = np.zeros((16, 8 * e), np.uint32)
    values = elements(words, bits)
    for lane in range(32):
        for i in range(4 * e):
            row = lane // 4 + (8 if i // e % 2 else 0)
            matrix[row, lane % 4 * e + i % e + (4 * e if i >= 2 * e else 0)] = values[lane, i // e, i % e]
    return matrix


def fragment_b(words: np.ndarray, bits: int) -> np.ndarray:
    """b[32 lanes][registers] to the matrix [K, 8]."""
    e = 32 // bits
    registers = words.shape[1]
    matrix = np.zeros((4 * e * registers, 8), np.uint32)
    values = elements(words, bits)
    for lane in range(32):
        for i in range(e * registers):
            matrix[lane % 4 * e + i % e + i // e * 4 * e, lane // 4] = values[lane, i // e, i % e]
    return matrix


def fragment_d(words: np.ndarray) -> np.ndarray:
    """d[32 lanes][4] to the matrix [16, 8]."""
    matrix = np.zeros((16, 8), words.dtype)
    for lane in range(32):
        for i in range(4):
            matrix[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] = words[lane, i]
    return matrix


def to_fragment_d(matrix: np.ndarray) -> np.ndarray:
    words = np.zeros((32, 4), matrix.dtype)
    for lane in range(32):
        for i in range(4):
            words[lane, i] = matrix[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2]
    return words


def spread(stored: np.ndarray, metadata: np.ndarray, selector: int, wide: bool) -> np.ndarray:
    """Stored [16, K / 2] and metadata[32] to the dense [16, K] (PTX ISA, sparse fragments)."""
    rows, columns = stored.shape
    dense = np.zeros((rows, 2 * columns), stored.dtype)
    for row in range(rows):
        for column in range(columns):
            if wide:  # 16-bit elements: a half word for 8 stored columns
                lane, bit = row % 8 * 4 + 2 * selector + column // 8, row // 8 * 16 + 2 * (column % 8)
            else:  # 8-bit elements: a word for 16 stored columns
                lane, bit = row % 8 * 4 + row // 8 + column // 16 * 2, 2 * (column % 16)
            dense[row, column // 2 * 4 + (int(metadata[lane]) >> bit & 3)] = stored[row, column]
    return dense


def _signed(values, bits):
    return values.astype(np.int64) - ((values >> (bits - 1) & 1).astype(np.int64) << bits)


ORDERED = [0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110]  # (first, second) with first < second


def _mma_inputs(kind):
    def inputs(rng):
        rounds = _words(ROUNDS * 416)(rng).reshape(ROUNDS, 416)
        if kind in ("f16", "bf16"):
            values = rng.standard_normal((ROUNDS, 256, 2)) * 2.0 ** rng.integers(-3, 4, (ROUNDS, 256, 2))
            if kind == "f16":
                halves = values.astype(np.float16).view(np.uint16).astype(np.uint32)
                halves[1, :, :] = rng.integers(0, 0x0400, halves[1].shape)  # subnormals
            else:
                halves = values.astype(np.float32).view(np.uint32) >> 16
            rounds[:, :256] = halves[..., 0] | halves[..., 1] << 16
            rounds[:, 256:384] = rng.standard_normal((ROUNDS, 128)).astype(np.float32).view(np.uint32)
        nibbles = np.array(ORDERED, np.uint32)[rng.integers(0, 6, (ROUNDS, 32, 8))]
        rounds[:, 384:] = (nibbles << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
        return rounds.reshape(-1)

    return inputs


def _mma(kind, sparse=False, selector=0):
    bits = {"f16": 16, "bf16": 16, "s8": 8, "s4": 4, "b1": 1}[kind]

    def expected(words):
        results = []
        for p in words.reshape(ROUNDS, 416):
            a = fragment_a(p[:128].reshape(32, 4), bits)
            b = fragment_b(p[128:256].reshape(32, 4)[:, : 4 if sparse else 2], bits)
            d = fragment_d(p[256:384].reshape(32, 4))
            if kind in ("f16", "bf16"):
                a, b, d = decode(a, kind), decode(b, kind), d.view(np.float32).astype(np.float64)
            elif kind == "b1":
                a, b, d = a.astype(np.int64), b.astype(np.int64), d.view(np.int32).astype(np.int64)
            else:
                a, b, d = _signed(a, bits), _signed(b, bits), d.view(np.int32).astype(np.int64)
            if sparse:
                a = spread(a, p[384:], selector, bits == 16)
            if bits == 16:
                results.append((to_fragment_d(d + a @ b), to_fragment_d(np.abs(d) + np.abs(a) @ np.abs(b))))
            else:
                results.append(to_fragment_d((d + a @ b).astype(np.uint64).astype(np.uint32)))
        if bits == 16:
            return np.stack([np.stack(part).reshape(-1) for part in zip(*results)])
        return np.stack(results).reshape(-1)

    return expected


def mma_error(words: np.ndarray, expected: np.ndarray) -> float:
    """Largest error relative to the sum of absolute products, of float32 words against (values, magnitudes)."""
    return float(np.max(np.abs(words.view(np.float32).astype(np.float64) - expected[0]) / expected[1]))


# Sums of up to 33 terms in float32. Tensor cores align the terms to the largest and cut off what is below some
# 24 bits of it, so the bound is on terms, not on the result: 33 cuts of 2^-23 and a rounding.
MMA_TOLERANCE = 34 * 2.0**-23


def _ldmatrix_inputs(rng):
    rounds = _words(ROUNDS * 160)(rng).reshape(ROUNDS, 160)
    rounds[:, 128:] = np.stack([rng.permutation(32) for _ in range(ROUNDS)])
    return rounds.reshape(-1)


def _ldmatrix(count, transposed):
    def expected(words):
        out = np.zeros((ROUNDS, 32, count), np.uint32)
        for r, p in enumerate(words.reshape(ROUNDS, 160)):
            rows = np.ascontiguousarray(p[:128]).view(np.uint16).reshape(32, 8)
            for i in range(count):
                matrix = rows[p[128 + 8 * i : 136 + 8 * i]]
                matrix = matrix.T if transposed else matrix
                for lane in range(32):
                    low, high = matrix[lane // 4, lane % 4 * 2], matrix[lane // 4, lane % 4 * 2 + 1]
                    out[r, lane, i] = np.uint32(low) | np.uint32(high) << 16
        return out.reshape(-1)

    return expected


# ---- memory --------------------------------------------------------------------------------------------------
def _neighbours(words):
    data = words.tobytes()
    out = b""
    for width in (1, 2, 4, 8, 16):
        out += b"".join(data[(lane ^ 1) * width : (lane ^ 1) * width + width] for lane in range(32))
    return np.frombuffer(out, np.uint32)


def _copy_inputs(limit):
    def inputs(rng):
        words = _words(160)(rng)
        words[128:] = rng.integers(0, limit + 1, 32)
        words[128:134] = [0, limit, 1, limit - 1, limit // 2, limit]
        return words

    return inputs


def _copied(limit):
    def expected(words):
        out = np.full((32, 16), 0x55, np.uint8)
        pieces = np.ascontiguousarray(words[:128]).view(np.uint8).reshape(32, 16)
        for lane in range(32):
            out[lane, :limit] = 0
            out[lane, : words[128 + lane]] = pieces[lane, : words[128 + lane]]
        return out[LANES ^ 1].reshape(-1).view(np.uint32)

    return expected


def _atomic_inputs(rng):
    words = rng.integers(0, 12, (4, 32))
    words[0, :8] = 7  # what compare-exchange looks for
    return words.reshape(-1)


def _atomic_floats(rng):
    values = rng.standard_normal((4, 32)).astype(np.float32)
    values[:, 0] = [1e-40, 1e-40, -3e-39, 1.0]  # subnormal operands
    values[:, 1] = [1.5e-38, -1.25e-38, 2e-38, 0]  # a subnormal sum
    values[:, 2] = [-2e-38, 1.9e-38, -0.0, -1e-42]  # and a negative one
    return values.view(np.uint32).reshape(-1)


def _flush(values):
    bits = values.astype(np.float32).view(np.uint32)
    return np.where(bits & 0x7F800000, bits, bits & 0x80000000).astype(np.uint32).view(np.float32)


def _atomic(update, dtype=np.uint32):
    def expected(words):
        rows = words.view(dtype).reshape(4, 32)
        value, old = rows[0], []
        for operand in rows[1:]:
            old.append(value)
            value = update(value, operand).astype(dtype)
        return np.stack([*old, value]).view(np.uint32).reshape(-1)

    return expected


def _cases():
    cases = []

    def add(name, n, words, inputs, expected, wrappers=None, tolerance=False):
        cases.append(Case(name, tuple(wrappers or [name]), n, words, inputs, expected, tolerance))

    for kind in ("f16", "bf16"):
        add(f"add_{kind}x2", 256, 256, _pairs(kind), _fma(kind, ("a", "1", "b")))
        add(f"sub_{kind}x2", 256, 256, _pairs(kind), _fma(kind, ("b", "-1", "a")))
        add(f"mul_{kind}x2", 256, 256, _pairs(kind), _fma(kind, ("a", "b", "-0")))
        add(f"fma_{kind}x2", 256, 256, _pairs(kind), _fma(kind, ("a", "b", "c")))
        add(f"pack_{kind}x2", 256, 256, _floats, _pack(kind))
        add(f"unpack_{kind}x2", 256, 512, lambda rng, k=kind: _pairs(k)(rng)[:256], _unpack(kind))
    add("lop3", 64, 512, _words(192), _lop3)
    add("prmt", 256, 256, _words(768), _prmt)
    add("funnel_shift_right", 256, 256, _words(768), _funnel)
    add("exp2_approx", 256, 256, _exponents, _exp2, tolerance=True)
    add("count_bits", 256, 256, _words(768), lambda w: np.array([int(v).bit_count() for v in w[:256]], np.uint32))
    add("float_bits", 256, 256, _floats, lambda w: w[:256], ["float_to_bits", "bits_to_float"])

    warp = ROUNDS * 32
    add("shuffle", ROUNDS, warp, _rounds(64), _warp(lambda v, a: v[a % 32]))
    add("shuffle_xor", ROUNDS, warp, _same_argument(32), _warp(lambda v, a: v[(LANES ^ a) % 32]))
    add("shuffle_down", ROUNDS, warp, _same_argument(32), _warp(_down))
    add("shuffle_wide", ROUNDS, 2 * warp, _rounds(32), _wide, ["shuffle"])
    add("ballot", ROUNDS, warp, _rounds(32),
        _warp(lambda v, a: np.full(32, int(((v & 1).astype(np.int64) << LANES).sum()))))
    add("any", ROUNDS, warp, _rounds(32), _warp(lambda v, a: np.full(32, int((v & 1).any()))))
    add("all", ROUNDS, warp, _rounds(32), _warp(lambda v, a: np.full(32, int((v & 1).all()))))
    add("lane_index", ROUNDS, warp, _rounds(32), _warp(lambda v, a: LANES))

    for shape, kind in (("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k32", "s8"), ("m16n8k64", "s4"),
                        ("m16n8k256", "b1")):
        add(f"mma_{shape}_{kind}", ROUNDS, ROUNDS * 128, _mma_inputs(kind), _mma(kind), tolerance="f" in kind)
    for kind in ("f16", "bf16"):
        for selector in (0, 1):
            add(f"mma_sp_m16n8k32_{kind}_{selector}", ROUNDS, ROUNDS * 128, _mma_inputs(kind),
                _mma(kind, True, selector), [f"mma_sp_m16n8k32_{kind}"], tolerance=True)
    add("mma_sp_m16n8k64_s8", ROUNDS, ROUNDS * 128, _mma_inputs("s8"), _mma("s8", True))
    for count in (1, 2, 4):
        for suffix in ("", "_transposed"):
            add(f"ldmatrix_x{count}{suffix}", ROUNDS, warp * count, _ldmatrix_inputs, _ldmatrix(count, bool(suffix)))

    shared = ["load_shared", "store_shared", "store_global", "sync_warp"]
    for name in ("load_global", "load_global_constant", "load_global_once", "load_global_volatile"):
        add(name, 1, 248, _words(128), _neighbours, [name, *shared])
    add("store_global_volatile", 1, 136, _words(128), lambda w: np.concatenate([w, w[:8]]))
    add("dynamic_shared", 1, 32, _words(32), lambda w: np.zeros(32, np.uint32))
    for name, limit in (("cp_async_16", 16), ("cp_async_16_once", 16), ("cp_async_8", 8), ("cp_async_4", 4)):
        add(name, 1, 128, _copy_inputs(limit), _copied(limit), [name, "cp_async_commit", "cp_async_wait"])

    add("atomic_add", 1, 128, _atomic_inputs, _atomic(lambda v, o: v + o))
    add("atomic_add_float", 1, 128, _atomic_floats, _atomic(lambda v, o: _flush(_flush(v) + _flush(o)), np.float32),
        ["atomic_add"])
    add("atomic_max", 1, 128, _atomic_inputs, _atomic(np.maximum))
    add("atomic_exchange", 1, 128, _atomic_inputs, _atomic(lambda v, o: o))
    add("atomic_compare_exchange", 1, 128, _atomic_inputs, _atomic(lambda v, o: np.where(v == 7, o, v)))
    add("atomic_inc_wrap", 1, 128, _atomic_inputs, _atomic(lambda v, o: np.where(v >= o, 0, v + 1)))

    add("barrier", 1, 64, _words(64), lambda w: w[np.arange(64) ^ 37], ["barrier", "fence"])
    add("named_barrier", 1, 64, _words(64), lambda w: w[np.arange(64) ^ 37], ["named_barrier", "region"])
    add("named_barrier_arrive", 1, 32, _words(32), lambda w: w[::-1])
    return cases


CASES = _cases()


def canonical(case: Case, words: np.ndarray) -> np.ndarray:
    """Words as they are compared: NaN payloads of float32 results are the machine's own."""
    return _canonical(words) if case.name.startswith("unpack") else words
