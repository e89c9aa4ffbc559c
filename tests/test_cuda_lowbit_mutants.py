"""Mutation test of the low-bit kernels: a planted defect must be caught by a violation or a wrong integer.

A mutant is a textual edit, compiled with few instances and run on small problems that the unchanged kernels pass.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_instances import instances
from cuda_lowbit import MIXED, NIBBLE_SOURCES, NIBBLES, SOURCES, Activations, multiply
from emulation import build
from test_cpu_int_linear import pack
from test_cuda_lowbit_linear import integer_weight

BYTES_KERNEL, NIBBLES_KERNEL = SOURCES[0], NIBBLE_SOURCES[-1]
LINEAR, CODES, STREAM = (f"cuda/tile/{name}.h" for name in ("lowbit_linear", "lowbit_codes", "stream_k"))
# What leaves instances for 16 tokens alone.
FEW_BYTES = [*instances(2), (BYTES_KERNEL, "  if (token_tiles == 16) return grouped ? nullptr : "
                                           "lowbit_linear<TERSOR_BITS, 16, false>;\n", "")]
FEW_NIBBLES = [*FEW_BYTES, (NIBBLES_KERNEL, "  if (token_tiles == 16) return grouped ? nullptr : "
                                            "lowbit_linear_nibbles<16, false>;\n", "")]


def check(library, problems):
    """Raises AssertionError (Violation is one) where an integer is wrong."""
    for seed, (n, k, group, act_group, symmetric, width, zeros, ranges) in enumerate(problems):
        weight = integer_weight(n, k, 4, group, symmetric, seed)
        padding = torch.randint(0, 16, (n, -k % 32), dtype=torch.uint8)
        weight.qweight = pack(torch.cat([weight.codes, padding], 1), 4)  # what lies behind k is nothing to the result
        block_bits = torch.tensor([4, 8, 8, 8][: -(-k // 128)], dtype=torch.uint8) if width == MIXED else None
        x = Activations(11, k, 8 if width != NIBBLES else 4, act_group, width, zeros, block_bits=block_bits, unit=True,
                        seed=seed)
        y, _ = multiply(library, x, weight, ranges=ranges, seeds=range(2))
        assert torch.equal(y.long(), x.integers @ weight.integers.T)


# (n, k, group, act_group, symmetric, width, zeros, ranges): ragged, stages shared by ranges, groups that end within a
# stage and that span several.
OF_BYTES = [(150, 300, 96, 32, False, 0, True, 4), (20, 900, 0, 256, True, 0, False, 3), (150, 300, 0, 0, False, 0,
                                                                                           True, 3)]
OF_NIBBLES = [(150, 300, 64, 128, False, NIBBLES, False, 4), (150, 470, 0, 64, True, MIXED, False, 5)]

SOURCES_OF = {"bytes": (SOURCES, FEW_BYTES, OF_BYTES), "nibbles": (NIBBLE_SOURCES, FEW_NIBBLES, OF_NIBBLES)}
MUTANTS = {
    "no barrier in the main loop": ("bytes", STREAM, "    ptx::barrier();                     // everyone's",
                                    "    // everyone's"),
    "a range that ends within a segment": ("bytes", LINEAR, "(range_ends && i + step == kStreamBlocks)", "false"),
    "scales only where a group ends": ("bytes", LINEAR, "at.stage + 1 < a.stages && !range_ends)",
                                       "at.stage + 1 < a.stages)"),
    "sums of weights past k": ("bytes", LINEAR, "act_channel_of_byte(i) + 8 * c < channels_left", "i >= 0"),
    "zero points without their product": ("bytes", LINEAR, "(weight_sum[r / 2][r % 2 * 2] + middle * channels)",
                                          "weight_sum[r / 2][r % 2 * 2]"),
    "the second four of the first": ("bytes", CODES, "shift = kWidth * kSecond - up", "shift = -up"),
    "the sign stays": ("nibbles", LINEAR, "weights[i / 2][2 + i % 2] = second.rows[0][i] ^ 0x88888888u;",
                       "weights[i / 2][2 + i % 2] = second.rows[0][i];"),
    "one factor for both widths": ("nibbles", LINEAR, "kBytes ? lowbit_factor(kBits) : 1);\n        }",
                                   "lowbit_factor(kBits));\n        }"),
    "ranges as if boundaries were not rounded": (
        "nibbles", LINEAR, "while (range + 1 < gridDim.y && first_unit(range + 1) <= unit) ++range;", ""),
    "tokens of the other half": ("nibbles", LINEAR, "piece = block + lane / 8 % 2", "piece = block + 1 - lane / 8 % 2"),
    "code sums of one block of two": ("nibbles", LINEAR, "for (int b = 0; b < step; ++b) add_code_sums",
                                      "for (int b = 0; b < 1; ++b) add_code_sums"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOURCES_OF)
def test_the_unchanged_kernels_pass(kind):
    sources, edits, problems = SOURCES_OF[kind]
    check(build(sources, {"TERSOR_BITS": 4}, edits=edits), problems)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name):
    kind, *edit = MUTANTS[name]
    sources, edits, problems = SOURCES_OF[kind]
    mutant = build(sources, {"TERSOR_BITS": 4}, edits=[*edits, tuple(edit)])
    with pytest.raises(AssertionError):  # Violation is one
        check(mutant, problems)


SANITIZED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from emulation import Emulated
from test_cuda_lowbit_mutants import SOURCES_OF, check
check(Emulated(Path({library!r})), SOURCES_OF["nibbles"][2] + SOURCES_OF["bytes"][2])
print("clean", flush=True)
"""


def test_sanitizers_find_nothing():
    """The same sources under AddressSanitizer and UBSan."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ has no AddressSanitizer runtime here")
    sources, edits, _ = SOURCES_OF["nibbles"]
    native = build(sources, {"TERSOR_BITS": 4}, sanitize=True, edits=edits)
    script = SANITIZED.format(tests=str(Path(__file__).parent), library=str(native.path))
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "clean" and done.returncode == 0, done.stderr[-4000:]
