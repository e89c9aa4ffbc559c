"""Every CUDA kernel keeps its budget on every target: recorded results, compiled again where the sources changed."""

import shutil

import compile_gate as gate
import pytest

HAVE_NVCC = bool(shutil.which("nvcc"))
needs_nvcc = pytest.mark.skipif(not HAVE_NVCC, reason="no CUDA compiler")


def test_what_changed_is_compiled_and_all_keep_their_budgets():
    record = gate.read_record()
    changed = gate.stale(record)
    if changed:
        assert HAVE_NVCC, f"{[kernel.name for kernel in changed]} changed since cuda/gate.json and nvcc is not here"
        record |= gate.gate(changed, gate.Nvcc())
    for kernel in gate.kernels():
        for define, targets in record[kernel.name]["variants"].items():
            assert set(targets) == set(kernel.targets)
            for target, instances in targets.items():
                assert instances, (kernel.name, define, target)
                for one in instances:
                    # The record keeps whole families of opcodes; finer names were checked when it was made.
                    rules = tuple(rule for rule in kernel.rules if rule.kind not in ("wants", "lacks"))
                    instance = gate.Instance(one["name"], one["registers"], one["shared"], one["stack"], one["spills"],
                                             one["opcodes"])
                    assert not gate.violations(gate.Kernel(kernel.path, (), rules), instance)


def test_the_document_has_the_records_table():
    text = gate.DOCUMENT.read_text(encoding="utf-8")
    assert "| sm80_int_linear | sm_90a |" in text and text == gate.with_table(text, gate.read_record())


def test_every_kernel_states_a_budget():
    assert len(gate.kernels()) == len(list(gate.KERNELS.glob("*.cu"))) > 0


SOURCE = """// gate: registers {registers}
// gate: wants {wants}
__global__ void __launch_bounds__(256, {blocks}) kernel(float* p, int n) {{
  float values[{size}];
  for (int i = 0; i < {size}; ++i) values[i] = p[threadIdx.x + i * n];
  __syncthreads();
  for (int i = 0; i < {size}; ++i) p[threadIdx.x + i * n] = values[{index}] * values[i];
}}
"""


def check(tmp_path, registers=255, wants="STG LDG", blocks=1, size=8, index="7 - i", target="90a"):
    path = tmp_path / "planted.cu"
    path.write_text(SOURCE.format(registers=registers, wants=wants, blocks=blocks, size=size, index=index))
    kernel = gate.Kernel(path, ("",), gate.read_kernel(path).rules)
    found = [text for one in gate.examine(kernel, "", target, gate.Nvcc()) for text in gate.violations(kernel, one)]
    return "; ".join(found)


@needs_nvcc
def test_planted_offences_are_found(tmp_path):
    assert check(tmp_path) == ""
    assert "registers, allowed are 4" in check(tmp_path, registers=4)
    assert "no HMMA" in check(tmp_path, wants="HMMA")
    assert "spills" in check(tmp_path, blocks=8, size=64, index="i")
    assert "local memory" in check(tmp_path, size=64, index="(i * n) & 63")


@needs_nvcc
def test_refusals_are_named(tmp_path):
    path = tmp_path / "broken.cu"
    path.write_text("// gate: registers 8\nthis is not C++\n")
    with pytest.raises(gate.GateError, match="broken.cu.*sm_80.*refused"):
        gate.examine(gate.read_kernel(path), "", "80", gate.Nvcc())
    path.write_text("__global__ void kernel() {}\n")
    with pytest.raises(gate.GateError, match="no '// gate:' line"):
        gate.read_kernel(path)
    path.write_text("// gate: registers 8\n// gate: targets 89 70\n")
    with pytest.raises(gate.GateError, match="targets 70; accepted are 80"):
        gate.read_kernel(path)
    path.write_text("// gate: registers 8\n// gate: targets 89 120a\n")
    assert gate.read_kernel(path).targets == ("89", "120a")
    path.write_text("// gate: registers\n// gate: fewest registers\n")
    with pytest.raises(gate.GateError, match="not understood"):
        gate.read_kernel(path)
