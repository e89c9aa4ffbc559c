// tersor_kv_encode and tersor_kv_decode: checks, the tables, and errors in words.
#include <cmath>

#include "common/status.h"
#include "cpu/isa.h"
#include "cpu/kv_codec.h"

using namespace tersor;

namespace {

// Ratio of the weights of 1 and 0, times 2^32: exp(-1 / (2 s^2)) for s = 0.25 * 1.146^i, then exp(-1 / b) for
// b = 0.15 * 1.28^i.
constexpr int kNormal = 40;
constexpr uint32_t kRatios[kCodecTables] = {
    0x0015fc21, 0x00944025, 0x027a0da6, 0x077d49e2, 0x11647b9b, 0x2109186f, 0x35d7d8fb, 0x4e1a5c8e,
    0x67ac5e34, 0x809fc96b, 0x9793da6e, 0xabc3cddd, 0xbcebb4d3, 0xcb1fbd95, 0xd6a693aa, 0xdfdd3b55,
    0xe724d981, 0xecd86721, 0xf147d91a, 0xf4b6a653, 0xf75c2c0d, 0xf964f7ea, 0xfaf463b9, 0xfc26323b,
    0xfd1005d6, 0xfdc2a230, 0xfe4af6a9, 0xfeb2f616, 0xff024284, 0xff3eb474, 0xff6cc467, 0xff8fdcbd,
    0xffaa98ed, 0xffbef62e, 0xffce78cd, 0xffda48ca, 0xffe347b7, 0xffea2172, 0xffef58ea, 0xfff351db,
    0x00536740, 0x01668886, 0x04604ab3, 0x0aa8515a, 0x155cdfbe, 0x24c7609d, 0x38397a12, 0x4e54a877,
    0x657e40f4, 0x7c428e26, 0x918ba676, 0xa4ae8326, 0xb55dc72d, 0xc391a5ac, 0xcf6f2c90, 0xd933e9e4,
    0xe12747b0, 0xe7911cf7, 0xecb444ce, 0xf0cc00b4, 0xf40b2251, 0xf69c3eae, 0xf8a26b01, 0xfa3a32c0,
};
constexpr int kEscapeFrequency = 2, kEscapeBits = 10;  // LEB128 takes one byte for small escapes, two for others

void make_table(int index, CodecTable* table) {
  uint64_t weight[128] = {uint64_t(1) << 32}, ratio = kRatios[index];
  const uint64_t square = (ratio * ratio) >> 32;
  for (int k = 1; k < 128; ++k) {
    weight[k] = (weight[k - 1] * ratio) >> 32;
    if (index < kNormal) ratio = (ratio * square) >> 32;  // weights fall as exp(-k^2 / (2 s^2))
  }
  uint64_t sum = weight[0];
  for (int k = 1; k < 128; ++k) sum += 2 * weight[k];
  int last = 1;  // the last symbol that is worth half a slot
  while (last < 127 && weight[last + 1] * kCodecSlots * 2 >= sum) ++last;
  sum = weight[0];
  for (int k = 1; k <= last; ++k) sum += 2 * weight[k];
  const int room = kCodecSlots - kEscapeFrequency;
  int left = room;
  for (int k = 1; k <= last; ++k) {
    const int share = static_cast<int>(weight[k] * room / sum);
    const int frequency = share < 1 ? 1 : share;
    table->frequency[k] = table->frequency[256 - k] = static_cast<uint16_t>(frequency);
    left -= 2 * frequency;
  }
  table->frequency[0] = static_cast<uint16_t>(left);
  table->frequency[kCodecEscape & 255] = kEscapeFrequency;
  const double escape = kCodecBits - std::log2(double(kEscapeFrequency)) + kEscapeBits;
  for (int symbol = -128, start = 0; symbol < 128; ++symbol) {
    const uint32_t byte = symbol & 255, frequency = table->frequency[byte];
    table->start[byte] = static_cast<uint16_t>(start);
    const double bits = !frequency || symbol == kCodecEscape ? escape : kCodecBits - std::log2(double(frequency));
    table->cost[byte] = static_cast<uint16_t>(bits * kCodecCostUnit + 0.5);
    for (uint32_t i = 0; i < frequency; ++i) table->slots[start++] = byte << 24 | frequency << 12 | i;
  }
}

struct Tables {
  CodecTable tables[kCodecTables] = {};
  Tables() {
    for (int i = 0; i < kCodecTables; ++i) make_table(i, &tables[i]);
  }
};

int check(const tersor_kv_stream* streams, int64_t count, int threads, bool encode) {
  if (count < 0 || (count && !streams)) return fail(TERSOR_INVALID, "streams are absent");
  if (threads < 1) return fail(TERSOR_INVALID, "threads is %d; accepted: 1 or more", threads);
  for (int64_t i = 0; i < count; ++i) {
    const tersor_kv_stream& s = streams[i];
    if (s.tokens < 1 || s.tokens > 4096 || s.dim < 1 || s.dim > 1024) {
      return fail(TERSOR_INVALID, "stream %lld: tokens is %lld, dim is %lld; accepted: 1 to 4096, 1 to 1024",
                  (long long)i, (long long)s.tokens, (long long)s.dim);
    }
    if (s.dtype < 0 || s.dtype > 2 || (encode && s.dtype)) {
      return fail(TERSOR_INVALID, "stream %lld: dtype is %lld; accepted: 0 float32%s", (long long)i,
                  (long long)s.dtype, encode ? "" : ", 1 bfloat16, 2 float16");
    }
    if (!s.bytes || s.size < 0 || !s.values || (s.tokens > 1 && s.stride < s.dim)) {
      return fail(TERSOR_INVALID, "stream %lld: bytes or values are absent, or its stride is under dim", (long long)i);
    }
    if (s.rotary_dim < 0 || s.rotary_dim > s.dim || s.rotary_dim % 2 || (s.rotary_dim && !s.rotation)) {
      return fail(TERSOR_INVALID, "stream %lld: rotary_dim is %lld; accepted: even, to dim = %lld, with a rotation",
                  (long long)i, (long long)s.rotary_dim, (long long)s.dim);
    }
  }
  return TERSOR_OK;
}

int report(int fault, int64_t stream) {
  static const char* const words[] = {
      "", "its header contradicts itself or its length", "it ends too early", "its escapes are damaged",
      "it does not end where it should", "its room is too small", "it has numbers that are not finite or too large"};
  if (fault == kCodecNoMemory) return fail(TERSOR_NO_MEMORY, "no memory for a stream");
  return fail(TERSOR_INVALID, "stream %lld: %s", (long long)stream, words[fault]);
}

}  // namespace

namespace tersor {

const CodecTable* codec_tables() {
  static const Tables* all = new Tables();  // never freed: threads may outlive static objects
  return all->tables;
}

}  // namespace tersor

extern "C" int64_t tersor_kv_encode_room(int64_t tokens, int64_t dim) {
  if (tokens < 1 || tokens > 4096 || dim < 1 || dim > 1024) {
    fail(TERSOR_INVALID, "tokens is %lld, dim is %lld; accepted: 1 to 4096, 1 to 1024", (long long)tokens,
         (long long)dim);
    return -1;
  }
  return kCodecHeader + 4 * dim + 128 + 6 * tokens * dim;  // at worst a word and a long escape for each number
}

extern "C" int tersor_kv_encode(tersor_kv_stream* streams, int64_t count, int threads) {
  if (const int status = check(streams, count, threads, true)) return status;
  for (int64_t i = 0; i < count; ++i) {
    if (!(streams[i].step_bits > 0 && streams[i].step_bits < 0x7c00)) {
      return fail(TERSOR_INVALID, "stream %lld: step is %lld; accepted: bits of a positive float16", (long long)i,
                  (long long)streams[i].step_bits);
    }
    if (streams[i].size < tersor_kv_encode_room(streams[i].tokens, streams[i].dim)) return report(kCodecRoom, i);
  }
  int64_t bad = -1;
  const int fault = count ? current_isa().kv_encode(streams, count, threads, &bad) : kCodecFine;
  return fault ? report(fault, bad) : TERSOR_OK;
}

extern "C" int tersor_kv_decode(const tersor_kv_stream* streams, int64_t count, int threads) {
  if (const int status = check(streams, count, threads, false)) return status;
  int64_t bad = -1;
  const int fault = count ? current_isa().kv_decode(streams, count, threads, &bad) : kCodecFine;
  return fault ? report(fault, bad) : TERSOR_OK;
}

extern "C" int tersor_kv_codec_table(int index, uint16_t* frequencies) {
  if (index < 0 || index >= kCodecTables || !frequencies) {
    return fail(TERSOR_INVALID, "table is %d; accepted: 0 to %d", index, kCodecTables - 1);
  }
  for (int i = 0; i < 256; ++i) frequencies[i] = codec_tables()[index].frequency[i];
  return TERSOR_OK;
}
