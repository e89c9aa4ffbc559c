"""Prints what this machine can do at most, for 1 thread and for all, as JSON.

    python bench/native/floors.py [--seconds 0.5] [--isa avx2]
"""

import argparse
import json
import os
import platform

import torch  # brings the OpenMP threads that the kernels run on

from tersor import _C


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each of the four loops")
    parser.add_argument("--isa", default=_C.isa(), choices=_C.isas())
    arguments = parser.parse_args()
    _C.set_isa(arguments.isa)
    cores = len(os.sched_getaffinity(0))
    result = {
        "machine": platform.processor() or platform.machine(),
        "isa": _C.isa(),
        "threading": _C.threading(),
        "torch": torch.__version__,
        "threads": {str(n): _C.machine_floors(n, arguments.seconds) for n in sorted({1, 2, cores}) if n <= cores},
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
