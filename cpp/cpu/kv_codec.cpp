// Encoding and decoding of the streams that kv_codec.h describes; one thread takes a stream at a time.
//
// Decoding works on 32 lanes at once: look up each lane's slot, advance its state, let those lanes that fell under 2^16
// take the next words in order. Rows are decoded table by table, so that the 16 KB of the table in use stay in the
// first cache. Symbols lie in [channel][token] until the last step, where blocks of 8 x 8 are turned over.
#include "cpu/kv_codec.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "common/float16.h"
#include "common/parallel.h"
#include "cpu/isa.h"
#include "cpu/kv_codec_vector.h"

namespace tersor::TERSOR_ISA {
namespace {

constexpr uint32_t kLow = 1u << 16;

// Memory that a thread keeps from stream to stream. Not std::vector: units compiled for different instruction sets must
// not share its code.
template <class T>
class Buffer {
 public:
  bool reserve(int64_t count) {
    if (count <= room_) return true;
    std::free(data_);
    data_ = static_cast<T*>(std::malloc(count * sizeof(T)));
    room_ = data_ ? count : 0;
    return data_ != nullptr;
  }
  T* data() { return data_; }
  T& operator[](int64_t index) { return data_[index]; }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

 private:
  T* data_ = nullptr;
  int64_t room_ = 0;
};

struct Row {
  int32_t channel, at, count;  // symbols [at, at + count) of the channel
  uint8_t table;
};

// Rows sorted by table: `modes` and `anchors` as in the stream. `rows` has room for 4 dim.
int64_t list_rows(const uint8_t* modes, const uint8_t* anchors, int64_t dim, int64_t tokens, Row* rows) {
  const int32_t heads = static_cast<int32_t>((tokens + kCodecGroup - 1) / kCodecGroup), all = int32_t(tokens);
  Row* plain = rows + 2 * dim;
  int64_t count = 0;
  int32_t places[kCodecTables + 1] = {};
  for (int32_t c = 0; c < dim; ++c) {
    const bool grouped = modes[c] >> 6;
    if (grouped) plain[count++] = {c, 0, heads, *anchors++};
    const int32_t at = grouped ? heads : 0;
    if (at < all) plain[count++] = {c, at, all - at, static_cast<uint8_t>(modes[c] & 63)};
  }
  for (int64_t i = 0; i < count; ++i) ++places[plain[i].table + 1];
  for (int t = 0; t < kCodecTables; ++t) places[t + 1] += places[t];
  for (int64_t i = 0; i < count; ++i) rows[places[plain[i].table]++] = plain[i];
  return count;
}

// -- decoding ---------------------------------------------------------------------------------------------------------

struct Words {
  const uint8_t *at, *end;
};

// Symbols one by one, from lane `lane` on; false when the words end.
bool decode_some(const uint32_t* slots, uint32_t* states, int lanes, int lane, Words* words, int32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i, lane = (lane + 1) & (lanes - 1)) {
    const uint32_t entry = slots[states[lane] & (kCodecSlots - 1)];
    uint32_t x = (entry >> kCodecBits & (kCodecSlots - 1)) * (states[lane] >> kCodecBits) +
                 (entry & (kCodecSlots - 1));
    if (x < kLow) {
      if (words->end - words->at < 2) return false;
      uint16_t word;
      std::memcpy(&word, words->at, 2);
      words->at += 2;
      x = x << 16 | word;
    }
    states[lane] = x;
    out[i] = static_cast<int32_t>(entry) >> 24;
  }
  return true;
}

bool decode_row(const uint32_t* slots, uint32_t* states, int lanes, Words* words, int32_t* out, int64_t n) {
  int64_t done = 0;
#if defined(TERSOR_CODEC_VECTOR)
  if (lanes == 32) done = decode_blocks(slots, states, &words->at, words->end, out, n / 32) * 32;
  // A block whose words may end goes one by one, and so do those after it.
  const int64_t left = (n - done) / 8 * 8;
  int lane = 0;
  for (int64_t i = 0; i < left && words->end - words->at >= 16; i += 8, done += 8, lane = (lane + 8) & (lanes - 1)) {
    decode_eight(slots, states + lane, &words->at, out + done);
  }
  return decode_some(slots, states, lanes, lane, words, out + done, n - done);
#else
  return decode_some(slots, states, lanes, 0, words, out + done, n - done);
#endif
}

// The symbols that a table does not hold.
bool read_escapes(Words* escapes, int32_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (out[i] != kCodecEscape) continue;
    int64_t value = 0;
    for (int shift = 0;; shift += 7) {
      if (escapes->at == escapes->end || shift > 21) return false;
      const uint8_t byte = *escapes->at++;
      value |= int64_t(byte & 127) << shift;
      if (byte & 128) continue;
      if (byte & 64) value -= int64_t(1) << (shift + 7);
      break;
    }
    if (value <= -kCodecLimit || value >= kCodecLimit) return false;
    out[i] = static_cast<int32_t>(value);
  }
  return true;
}

// The integers of a channel from its symbols: rows of [anchors, others] become tokens in order.
void join_groups(const int32_t* symbols, int64_t tokens, int mode, int mean, int32_t* out) {
  if (!mode) {
    for (int64_t t = 0; t < tokens; ++t) out[t] = 8 * symbols[t] + mean;
    return;
  }
  const int64_t heads = (tokens + kCodecGroup - 1) / kCodecGroup;
  const int32_t* rest = symbols + heads;
  const int a = kCodecPredictor[mode];
  for (int64_t g = 0; g < heads; ++g) {
    const int64_t first = g * kCodecGroup, count = tokens - first < kCodecGroup ? tokens - first : kCodecGroup;
    out[first] = 4 * symbols[g] + mean;
    const int32_t base = a * symbols[g] + mean;
    for (int64_t t = 1; t < count; ++t) out[first + t] = 8 * rest[t - 1] + base;
    rest += count - 1;
  }
}

struct Decoder {
  Buffer<Row> rows;
  Buffer<int32_t> symbols, joined;
  Buffer<float> values;

  int operator()(const tersor_kv_stream* stream) {
    const tersor_kv_stream& s = *stream;
    const int64_t dim = s.dim, tokens = s.tokens, pitch = (tokens + 7) / 8 * 8;
    if (s.size < kCodecHeader) return kCodecHeaderBad;
    const uint8_t *at = s.bytes, *end = s.bytes + s.size;
    uint16_t step_bits;
    uint32_t escape_bytes;
    std::memcpy(&step_bits, at, 2);
    std::memcpy(&escape_bytes, at + 4, 4);
    const int flags = at[2], lanes = flags & 2 ? 32 : 8;
    const int64_t mean_bytes = flags & 1 ? 2 : 1;
    if (flags > 3 || at[3] || step_bits == 0 || step_bits >= 0x7c00) return kCodecHeaderBad;
    at += kCodecHeader;
    if (end - at < dim * (mean_bytes + 1)) return kCodecHeaderBad;
    const uint8_t *means = at, *modes = at + dim * mean_bytes, *anchors = modes + dim;
    int64_t grouped = 0;
    for (int64_t c = 0; c < dim; ++c) grouped += modes[c] >> 6 != 0;
    if (end - anchors < grouped + lanes * 4 + int64_t(escape_bytes)) return kCodecHeaderBad;
    for (int64_t i = 0; i < grouped; ++i) {
      if (anchors[i] >= kCodecTables) return kCodecHeaderBad;
    }
    uint32_t states[32];
    std::memcpy(states, anchors + grouped, lanes * 4);
    Words words{anchors + grouped + lanes * 4, end - escape_bytes}, escapes{end - escape_bytes, end};
    if (!rows.reserve(4 * dim) || !symbols.reserve(dim * pitch) || !joined.reserve(pitch) ||
        !values.reserve(dim * pitch)) {
      return kCodecNoMemory;
    }
    const int64_t count = list_rows(modes, anchors, dim, tokens, rows.data());
    for (int64_t r = 0; r < count; ++r) {
      const Row& row = rows[r];
      int32_t* out = symbols.data() + row.channel * pitch + row.at;
      if (!decode_row(codec_tables()[row.table].slots, states, lanes, &words, out, row.count)) return kCodecWordsEnd;
      int32_t least = 0;
      for (int64_t i = 0; i < row.count; ++i) least = out[i] < least ? out[i] : least;
      if (least == kCodecEscape && !read_escapes(&escapes, out, row.count)) return kCodecEscapesBad;
    }
    for (int i = 0; i < lanes; ++i) {
      if (states[i] != kLow) return kCodecNotAtEnd;
    }
    if (words.at != words.end || escapes.at != escapes.end) return kCodecNotAtEnd;

    const float unit = fp16_to_float(step_bits) * 0.125f;
    for (int64_t c = 0; c < dim; ++c) {
      int16_t mean;
      if (mean_bytes == 2) {
        std::memcpy(&mean, means + 2 * c, 2);
      } else {
        mean = static_cast<int8_t>(means[c]);
      }
      join_groups(symbols.data() + c * pitch, tokens, modes[c] >> 6, mean, joined.data());
      if (s.levels) std::memcpy(s.levels + c * tokens, joined.data(), tokens * 4);
      float* out = values.data() + c * pitch;
      for (int64_t t = 0; t < tokens; ++t) out[t] = static_cast<float>(joined[t]) * unit;
    }
    turn(s, pitch);
    turn_over(values.data(), pitch, s);
    return kCodecFine;
  }

  // Rotary embedding of the first channels.
  void turn(const tersor_kv_stream& s, int64_t pitch) {
    const int64_t half = s.rotary_dim / 2;
    for (int64_t i = 0; i < half; ++i) {
      float* x = values.data() + (s.interleaved ? 2 * i : i) * pitch;
      float* y = values.data() + (s.interleaved ? 2 * i + 1 : i + half) * pitch;
      const float *cosine = s.rotation + i * s.tokens, *sine = s.rotation + (half + i) * s.tokens;
      for (int64_t t = 0; t < s.tokens; ++t) {
        const float a = x[t], b = y[t];
        x[t] = a * cosine[t] - b * sine[t];
        y[t] = b * cosine[t] + a * sine[t];
      }
    }
  }
};

// -- encoding ---------------------------------------------------------------------------------------------------------

struct Histogram {
  uint32_t count[256] = {};  // by symbol + 128; what does not fit counts as the escape, 0
  int low = 255, high = 0;
  void add(const int32_t* symbols, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t place = static_cast<uint32_t>(symbols[i] + 128);
      const int at = place < 256 ? static_cast<int>(place) : 0;
      ++count[at];
      low = at < low ? at : low;
      high = at > high ? at : high;
    }
  }
  // The table that takes the fewest bits, and how many (times kCodecCostUnit).
  uint64_t best(uint8_t* table) const {
    uint64_t least = ~uint64_t(0);
    for (int t = 0; t < kCodecTables; ++t) {
      uint64_t cost = 0;
      for (int at = low; at <= high; ++at) cost += count[at] * uint64_t(codec_tables()[t].cost[(at - 128) & 255]);
      if (cost < least) {
        least = cost;
        *table = static_cast<uint8_t>(t);
      }
    }
    return least;
  }
};

// Nearest integer, for numbers under 2^22.
inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

struct Encoder {
  Buffer<Row> rows;
  Buffer<int32_t> symbols, tried, means;
  Buffer<float> x;
  Buffer<uint8_t> modes, anchors, escapes;
  int64_t anchor_count = 0, escape_count = 0;

  int operator()(tersor_kv_stream* s) {
    const int64_t dim = s->dim, tokens = s->tokens;
    const uint16_t step_bits = static_cast<uint16_t>(s->step_bits);
    const float per_unit = 8.0f / fp16_to_float(step_bits);
    if (!rows.reserve(4 * dim) || !symbols.reserve(dim * tokens) || !tried.reserve(tokens) || !means.reserve(dim) ||
        !x.reserve(tokens) || !modes.reserve(dim) || !anchors.reserve(dim) || !escapes.reserve(4 * dim * tokens)) {
      return kCodecNoMemory;
    }
    anchor_count = escape_count = 0;
    bool wide = false;
    for (int64_t c = 0; c < dim; ++c) {
      const float* column = static_cast<const float*>(s->values) + c;
      double sum = 0;
      float most = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        x[t] = column[t * s->stride] * per_unit;
        if (!(std::fabs(x[t]) < float(kCodecLimit) * 4)) return kCodecNotFinite;
        sum += x[t];
        most = std::fabs(x[t]) > most ? std::fabs(x[t]) : most;
      }
      double mean = std::nearbyint(sum / double(tokens));
      mean = mean > 32767 ? 32767 : mean < -32767 ? -32767 : mean;
      means[c] = static_cast<int32_t>(mean);
      wide |= means[c] > 127 || means[c] < -127;
      for (int64_t t = 0; t < tokens; ++t) x[t] -= float(mean);
      fit_channel(tokens, symbols.data() + c * tokens, &modes[c]);
    }
    const int64_t count = list_rows(modes.data(), anchors.data(), dim, tokens, rows.data());
    write(s, count, step_bits, wide, dim * tokens >= 8192 ? 32 : 8);
    return kCodecFine;
  }

  // Symbols of the channel in x, by whichever predictor costs least.
  void fit_channel(int64_t tokens, int32_t* out, uint8_t* mode) {
    for (int64_t t = 0; t < tokens; ++t) out[t] = static_cast<int32_t>(nearest(x[t] * 0.125f));
    uint8_t table = 0;
    Histogram plain;
    plain.add(out, tokens);
    uint64_t least = plain.best(&table);
    *mode = table;
    const int64_t heads = (tokens + kCodecGroup - 1) / kCodecGroup;
    if (heads == tokens) return;
    // Twice the anchors' share in the others, over what they have themselves: under a quarter, nothing is to be gained.
    double own = 0, shared = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      if (t % kCodecGroup == 0) continue;
      const double a = x[t - t % kCodecGroup];
      own += a * a;
      shared += a * x[t];
    }
    if (shared < 0.25 * own || own == 0) return;
    uint8_t anchor_table = 0, best_anchor = 0;
    for (int m = 1; m < 4; ++m) {
      Histogram of_anchors, of_rest;
      for (int64_t g = 0; g < heads; ++g) tried[g] = static_cast<int32_t>(nearest(x[g * kCodecGroup] * 0.25f));
      int64_t at = heads;
      for (int64_t t = 0; t < tokens; ++t) {
        if (t % kCodecGroup == 0) continue;
        const float predicted = float(kCodecPredictor[m] * tried[t / kCodecGroup]);
        tried[at++] = static_cast<int32_t>(nearest((x[t] - predicted) * 0.125f));
      }
      of_anchors.add(tried.data(), heads);
      of_rest.add(tried.data() + heads, tokens - heads);
      const uint64_t cost = of_anchors.best(&anchor_table) + of_rest.best(&table) + 8 * kCodecCostUnit;
      if (cost < least) {
        least = cost;
        *mode = static_cast<uint8_t>(m << 6 | table);
        best_anchor = anchor_table;
        std::memcpy(out, tried.data(), tokens * 4);
      }
    }
    if (*mode >> 6) anchors[anchor_count++] = best_anchor;
  }

  void write(tersor_kv_stream* s, int64_t count, uint16_t step_bits, bool wide, int lanes) {
    uint32_t states[32];
    for (uint32_t& x_ : states) x_ = kLow;
    uint8_t* const end = s->bytes + s->size;
    uint8_t* words = end;  // written from the end of the room backwards, then moved
    for (int64_t r = count; r-- > 0;) {
      const Row& row = rows[r];
      const CodecTable& table = codec_tables()[row.table];
      const int32_t* in = symbols.data() + row.channel * s->tokens + row.at;
      for (int64_t i = row.count; i-- > 0;) {
        int32_t symbol = in[i];
        if (symbol < -127 || symbol > 127 || !table.frequency[symbol & 255]) {
          escape(symbol);
          symbol = kCodecEscape;
        }
        const uint32_t frequency = table.frequency[symbol & 255];
        uint32_t& state = states[i & (lanes - 1)];
        if (state >= frequency << 20) {
          words -= 2;
          const uint16_t word = static_cast<uint16_t>(state);
          std::memcpy(words, &word, 2);
          state >>= 16;
        }
        state = (state / frequency << kCodecBits) + state % frequency + table.start[symbol & 255];
      }
    }
    uint8_t* at = s->bytes;
    const uint32_t escape_bytes = static_cast<uint32_t>(escape_count);
    std::memcpy(at, &step_bits, 2);
    at[2] = static_cast<uint8_t>((wide ? 1 : 0) | (lanes == 32 ? 2 : 0));
    at[3] = 0;
    std::memcpy(at + 4, &escape_bytes, 4);
    at += kCodecHeader;
    for (int64_t c = 0; c < s->dim; ++c) {
      const int16_t narrow = static_cast<int16_t>(means[c]);
      std::memcpy(at, &narrow, wide ? 2 : 1);  // little-endian: the low byte first
      at += wide ? 2 : 1;
    }
    std::memcpy(at, modes.data(), s->dim);
    at += s->dim;
    std::memcpy(at, anchors.data(), anchor_count);
    at += anchor_count;
    std::memcpy(at, states, lanes * 4);
    at += lanes * 4;
    std::memmove(at, words, end - words);
    at += end - words;
    for (int64_t i = escape_count; i-- > 0;) *at++ = escapes[i];
    s->size = at - s->bytes;
  }

  // Signed LEB128, backwards like all that is written.
  void escape(int32_t value) {
    uint8_t bytes[5];
    int count = 0;
    for (bool last = false; !last;) {
      const uint8_t low = value & 127;
      value >>= 7;
      last = value == (low & 64 ? -1 : 0);
      bytes[count++] = static_cast<uint8_t>(low | (last ? 0 : 128));
    }
    while (count) escapes[escape_count++] = bytes[--count];
  }
};

// Streams to threads, one at a time; the first fault by the order of streams is told.
template <class Worker, class Stream>
int each(Stream* streams, int64_t count, int threads, int64_t* bad) {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> first{count * 16};  // stream * 16 + fault
  threads = static_cast<int>(threads < count ? threads : count);
  parallel_for(threads, [&](int) {
    int64_t at = 0;
    auto tell = [&](int fault) {
      int64_t mine = at * 16 + fault, seen = first.load();
      while (mine < seen && !first.compare_exchange_weak(seen, mine)) {
      }
    };
    Worker worker;
    while ((at = next.fetch_add(1)) < count) {
      if (const int fault = worker(streams + at)) tell(fault);
    }
  });
  const int64_t found = first.load();
  if (found == count * 16) return kCodecFine;
  *bad = found / 16;
  return static_cast<int>(found % 16);
}

}  // namespace

int kv_encode(tersor_kv_stream* streams, int64_t count, int threads, int64_t* bad) {
  return each<Encoder>(streams, count, threads, bad);
}
int kv_decode(const tersor_kv_stream* streams, int64_t count, int threads, int64_t* bad) {
  return each<Decoder>(streams, count, threads, bad);
}

}  // namespace tersor::TERSOR_ISA
