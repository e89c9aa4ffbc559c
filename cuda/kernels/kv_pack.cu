// Full raw pages to 8, 4, 3 or 2 bits, in the order of tile/kv_layout.h.
//
//   A lane of a record has the same 64 tokens x 16 channels before and after, so codes never leave their lane: only the
//   ranges are shared. A warp takes a record of keys, whose channels range over the lanes of one t, or a group of
//   values, whose tokens do; it reads a record for the ranges, and (from L1 for values) again for the codes.
//
//   x = minimum + scale * code as in python/tersor/kv/layout.py: the minimum is the largest float16 not above the least
//   number, the scale the least float16 that reaches the greatest, both found in double precision; a code is the
//   nearest, halves up. What is not finite makes its group's scale NaN. Equal to that reference to the bit.
//
//   No shared memory. A page is packed once in 64 steps of decoding; a captured launch has its jobs all the same, with
//   addresses of 0 where there is nothing to do.
//
// gate: registers 168
// gate: wants LDG.E.128.CONSTANT STG.E.128 SHFL
#include "kernels/kv_pack.h"

#include "ptx/ptx.h"
#include "tile/kv_pack.h"

namespace tersor {
namespace {

using Four = ptx::Vec<uint32_t, 4>;

struct KvPack {
  const KvPackArguments& a;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  TERSOR_DEVICE explicit KvPack(const KvPackArguments& arguments) : a(arguments) {}

  TERSOR_DEVICE void load(uint32_t (&pairs)[16], const char* record) const {
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      const Four four =
          ptx::load_global_constant(reinterpret_cast<const Four*>(record + kv_word_offset(16, lane, i)));
#pragma unroll
      for (int j = 0; j < 4; ++j) pairs[i + j] = four[j];
    }
  }
  TERSOR_DEVICE ptx::Vec<float, 2> unpack(uint32_t pair) const {
    return a.is_bfloat16 ? ptx::unpack_bf16x2(pair) : ptx::unpack_f16x2(pair);
  }

  // The words of a record; fits(pair) gives the parameters of its two numbers.
  template <int kBits, class Fits>
  TERSOR_DEVICE void store_codes(char* to, const uint32_t (&pairs)[16], const Fits& fits) const {
    constexpr float levels = (1 << kBits) - 1;
    uint32_t words[kBits];
    pack_words<kBits>(words, [&](int pair) {
      const auto x = unpack(pairs[pair]);
      const Parameters* two = fits(pair);
      return two[0].code(x[0], levels) | two[1].code(x[1], levels) << 16;
    });
    store_words<kBits>(to, lane, words);
  }
  template <class Fits>
  TERSOR_DEVICE void store_codes(int bits, char* to, const uint32_t (&pairs)[16], const Fits& fits) const {
    switch (bits) {
      case 2: return store_codes<2>(to, pairs, fits);
      case 3: return store_codes<3>(to, pairs, fits);
      case 4: return store_codes<4>(to, pairs, fits);
      default: return store_codes<8>(to, pairs, fits);
    }
  }

  // Pair 2j + h: token 8j + g, channels 4t + 2h and + 1.
  TERSOR_DEVICE void pack_keys(char* to, const char* from) const {
    uint32_t pairs[16];
    load(pairs, from);
    Range ranges[4] = {empty_range(), empty_range(), empty_range(), empty_range()};
#pragma unroll
    for (int pair = 0; pair < 16; ++pair) {
      const auto x = unpack(pairs[pair]);
      extend(ranges[pair % 2 * 2], x[0]);
      extend(ranges[pair % 2 * 2 + 1], x[1]);
    }
    Parameters fits[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) fits[i] = fit(shared_range(ranges[i]), float((1 << a.key_bits) - 1));
    if (g == 0) {
      Four four;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        four[half] = fits[2 * half].scale_bits | fits[2 * half + 1].scale_bits << 16;
        four[2 + half] = fits[2 * half].minimum_bits | fits[2 * half + 1].minimum_bits << 16;
      }
      ptx::store_global(reinterpret_cast<Four*>(to + 16 * t), four);
    }
    store_codes(a.key_bits, to + kKvKeyParameters, pairs, [&](int pair) { return fits + pair % 2 * 2; });
  }

  // Pair 4i + 2a + h: tokens 16i + 8h + 2t and + 1, channel 8a + g.
  TERSOR_DEVICE void pack_values(char* to, const char* from) const {
    const auto first_token = [](int pair) { return 2 * (pair / 4 * 2 + pair % 2); };
    const int records = kv_group_records(a.dim);
    uint32_t pairs[16];
    Range ranges[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) ranges[i] = empty_range();
#pragma unroll 1
    for (int record = 0; record < records; ++record) {
      load(pairs, from + record * kv_code_bytes(16));
#pragma unroll
      for (int pair = 0; pair < 16; ++pair) {
        const auto x = unpack(pairs[pair]);
        extend(ranges[first_token(pair)], x[0]);
        extend(ranges[first_token(pair) + 1], x[1]);
      }
    }
    Parameters fits[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) fits[i] = fit(shared_range(ranges[i]), float((1 << a.value_bits) - 1));
    if (g == 0) {
#pragma unroll
      for (int i = 0; i < 16; i += 8) {
        Four scales, minima;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          scales[j] = fits[i + 2 * j].scale_bits | fits[i + 2 * j + 1].scale_bits << 16;
          minima[j] = fits[i + 2 * j].minimum_bits | fits[i + 2 * j + 1].minimum_bits << 16;
        }
        ptx::store_global(reinterpret_cast<Four*>(to + 32 * t + 2 * i), scales);
        ptx::store_global(reinterpret_cast<Four*>(to + kKvValueParameters / 2 + 32 * t + 2 * i), minima);
      }
    }
#pragma unroll 1
    for (int record = 0; record < records; ++record) {
      load(pairs, from + record * kv_code_bytes(16));
      store_codes(a.value_bits, to + kKvValueParameters + record * kv_code_bytes(a.value_bits), pairs,
                  [&](int pair) { return fits + first_token(pair); });
    }
  }

  TERSOR_DEVICE void copy(char* to, const char* from, int bytes) const {
    for (int at = 16 * threadIdx.x; at < bytes; at += 16 * 32 * kKvPackWarps) {
      ptx::store_global(reinterpret_cast<Four*>(to + at),
                        ptx::load_global_constant(reinterpret_cast<const Four*>(from + at)));
    }
  }

  TERSOR_DEVICE void run() const {
    const int warp = threadIdx.x / 32, head = blockIdx.y;
    const auto job =
        ptx::load_global_constant(reinterpret_cast<const ptx::Vec<int64_t, 2>*>(a.jobs) + blockIdx.x);
    if (job[0] == 0 || job[1] == 0) return;
    const char* raw = reinterpret_cast<const char*>(job[0]) + int64_t(head) * kv_page_bytes(a.dim, 16, 16);
    char* packed = reinterpret_cast<char*>(job[1]) + int64_t(head) * kv_page_bytes(a.dim, a.key_bits, a.value_bits);
    if (a.key_bits == 16) {
      copy(packed, raw, kv_key_bytes(a.dim, 16));
    } else {
      for (int record = warp; record < a.dim / kKvRecordChannels; record += kKvPackWarps) {
        pack_keys(packed + record * kv_key_record_bytes(a.key_bits), raw + record * kv_code_bytes(16));
      }
    }
    raw += kv_key_bytes(a.dim, 16);
    packed += kv_key_bytes(a.dim, a.key_bits);
    if (a.value_bits == 16) return copy(packed, raw, kv_value_bytes(a.dim, 16));
    for (int group = warp; group < a.dim / kKvRecordChannels / kv_group_records(a.dim); group += kKvPackWarps) {
      pack_values(packed + group * kv_value_group_bytes(a.dim, a.value_bits),
                  raw + group * kv_value_group_bytes(a.dim, 16));
    }
  }
};

__global__ void __launch_bounds__(32 * kKvPackWarps) kv_pack(const KvPackArguments arguments) {
  KvPack(arguments).run();
}

const bool entered = (kv_pack_kernel = kv_pack, true);

}  // namespace
}  // namespace tersor
