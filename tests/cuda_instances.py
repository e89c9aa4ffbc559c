"""Edits that leave few instances of the CUDA kernels to compile, for tests that compile many versions of one."""

HEADER = "cuda/kernels/instances.h"


def instances(token_tiles, types=("BFloat16", "Float16")):
    """Those that multiply 8 * token_tiles tokens at once, with the 16-bit results named."""
    edits = [(HEADER, f"    case {t}: return of(std::integral_constant<int, {t}>());\n", "") for t in (1, 2, 4, 8)
             if t != token_tiles]
    return (*edits, *((HEADER, f"[&](auto tiles) {{ return of({name}(), tiles); }}",
                       "[](auto) -> Kernel* { return nullptr; }") for name in ("BFloat16", "Float16")
                      if name not in types))
