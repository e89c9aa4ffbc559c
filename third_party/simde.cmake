# SIMDe (MIT), 0.7.4 or newer, headers only (Debian: libsimde-dev). Optional and never shipped in a
# wheel: it lets the tests run the AVX-512 sources on a machine without AVX-512.
set(TERSOR_SIMDE_INCLUDE_DIR)
if(NOT TERSOR_EMULATE_AVX512 STREQUAL "OFF")
  find_path(TERSOR_SIMDE_PATH simde/x86/avx512.h)
  if(TERSOR_SIMDE_PATH)
    set(TERSOR_SIMDE_INCLUDE_DIR ${TERSOR_SIMDE_PATH})
  elseif(TERSOR_EMULATE_AVX512 STREQUAL "ON")
    message(FATAL_ERROR "TERSOR_EMULATE_AVX512=ON needs the SIMDe headers (Debian: libsimde-dev)")
  endif()
endif()
