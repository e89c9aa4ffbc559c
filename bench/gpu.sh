#!/usr/bin/env bash
# Everything that needs a GPU, in one go, meant to take under ten minutes on 16 cores:
#
#     bench/gpu.sh [FOLDER]      # results go to FOLDER (default: bench/results)
#
# Builds for the GPU that is present, runs the tests that use it, compute-sanitizer on the small ones, records what the
# instruction wrappers do (tests/data/ptx_replay.npz) and measures the kernels. A step that fails does not keep the
# others from running; the script ends with a line for each and fails if one did.
#
#   PYTHON     a Python with torch for this GPU (default python3); it is not changed: a virtual environment goes on top
#   PIP_FLAGS  such as "--no-index --find-links wheels" where there is no network
#   STEPS      such as "build test bench" (default: all)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$(mkdir -p "${1:-bench/results}" && cd "${1:-bench/results}" && pwd)
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv-gpu}
STEPS=${STEPS:-build test sanitize record bench}
JOBS=$(nproc)
TOLD=()

step() {  # name, seconds, command...
  local name=$1 limit=$2 begin=$SECONDS
  shift 2
  [[ " $STEPS " == *" ${name%%:*} "* ]] || return 0
  echo "=== $name"
  timeout "$limit" "$@" 2>&1 | tee "$OUT/gpu-${name//:/-}.log" | tail -n 40
  local status=${PIPESTATUS[0]}
  TOLD+=("$name: $([[ $status == 0 ]] && echo passed || echo "FAILED ($status)"), $((SECONDS - begin)) s")
  return "$status"
}

build() {
  local capability architecture
  capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return
  architecture=$capability
  [[ $capability == 90 || $capability == 1* ]] && architecture=${capability}a
  "$PYTHON" -m venv "$VENV" || return
  # What PYTHON sees is seen here too, also where it lives in a virtual environment itself.
  "$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/underneath.pth" || return
  # shellcheck disable=SC2086
  "$VENV/bin/python" -m pip install -q ${PIP_FLAGS:-} scikit-build-core pybind11 ninja cmake pytest hypothesis \
    transformers safetensors numpy pyyaml typer rich || return
  CMAKE_BUILD_PARALLEL_LEVEL=$JOBS "$VENV/bin/python" -m pip install -q --no-build-isolation --no-deps . \
    -C cmake.define.TERSOR_CUDA=ON -C "cmake.define.TERSOR_CUDA_ARCHITECTURES=$architecture-real" \
    -C "cmake.define.TERSOR_CUDA_FP8_ARCHITECTURES=$architecture-real" \
    -C cmake.define.TERSOR_EMULATE_AVX512=OFF || return
  "$VENV/bin/python" -c 'import tersor._C as c; print(c.cuda_devices()); assert c.has_cuda_build and c.cuda_devices()'
}

sanitize() {
  local failed=0
  for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --kernel-name "regex=int_|lowbit|quantize|producer|float_|fp8|fp4|kv_" \
      "$VENV/bin/python" bench/small_gpu_calls.py || failed=1
  done
  return $failed
}

export -f build sanitize
export PYTHON VENV JOBS PIP_FLAGS=${PIP_FLAGS:-}
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv
step build 300 bash -c build || { printf '%s\n' "${TOLD[@]}"; exit 1; }
step test 240 "$VENV/bin/python" -m pytest -q -m gpu tests/test_cuda_int_linear.py tests/test_cuda_layer.py \
  tests/test_cuda_experts.py tests/test_cuda_lowbit_fused.py tests/test_ops_float_cuda.py tests/test_kv_cuda_cache.py \
  tests/test_kv_static.py
step sanitize 240 bash -c sanitize
step record 60 "$VENV/bin/python" bench/record_ptx.py && [[ $OUT != "$PWD/bench/results" ]] &&
  cp tests/data/ptx_replay.npz "$OUT/"
step bench 240 "$VENV/bin/python" bench/linear.py --device cuda --out "$OUT/linear-cuda.json"
step bench:lowbit 240 "$VENV/bin/python" bench/lowbit_cuda.py --out "$OUT/lowbit-cuda.json"
step bench:attention 120 "$VENV/bin/python" bench/attention_cuda.py --out "$OUT/attention-cuda.json" \
  --specs K16V16,K8V8,K4V4,K2V2
printf '%s\n' "${TOLD[@]}"
[[ "${TOLD[*]}" != *FAILED* ]]
