// Which numbers of a page are stored apart: again and again the largest or the smallest number of the vector (what
// shares a scale) whose squared range falls most, as python/tersor/kv/formats.py chooses them.
#pragma once

#include "ptx/math.h"
#include "ptx/ptx.h"
#include "tile/kv_layout.h"

namespace tersor {

constexpr int kKvMostVectors = 512;
constexpr int kKvChooseBytes = 12 * kKvMostVectors;  // of shared memory: a gain and a place for each vector

// One warp's work, vector by vector; ties go to the first. number(v, i) is the i-th number of a vector.
template <class Number>
struct KvChooser {
  const ptx::shared_t gains;      // double [vectors], then int [vectors]
  const ptx::shared_t taken;      // a bit for each number of a vector: [vectors][words]
  const int words, vectors, length;
  const bool symmetric;           // ranges are those of magnitudes, from 0
  const Number& number;

  TERSOR_DEVICE ptx::shared_t place_of(int v) const { return gains + 8 * kKvMostVectors + 4 * v; }
  TERSOR_DEVICE ptx::shared_t word_of(int v, int i) const { return taken + 4 * (v * words + i / 32); }

  // The two largest of what lanes have, and the place of the first. Smallest ones: of negated numbers.
  struct Top {
    float first, second;
    int at;
    TERSOR_DEVICE void add(float x, int i) {
      if (x > first) {
        second = first;
        first = x;
        at = i;
      } else if (x > second) {
        second = x;
      }
    }
    TERSOR_DEVICE void merge() {
      for (int mask = 1; mask <= 16; mask *= 2) {
        const float other = ptx::shuffle_xor(first, mask), behind = ptx::shuffle_xor(second, mask);
        const int other_at = ptx::shuffle_xor(at, mask);
        const bool theirs = other > first || (other == first && other_at < at);
        const float loser = theirs ? first : other, follower = theirs ? behind : second;
        second = loser > follower ? loser : follower;
        first = theirs ? other : first;
        at = theirs ? other_at : at;
      }
    }
  };

  // What the next removal from vector v would be worth, to shared memory.
  TERSOR_DEVICE void look_at(int v) const {
    const int lane = threadIdx.x % 32;
    const float none = ptx::bits_to_float(0xff800000);
    Top high = {none, none, INT32_MAX}, low = high;
    int left = 0;
    bool finite = true;
    for (int i = lane; i < length; i += 32) {
      float x = number(v, i);
      finite = finite && (ptx::float_to_bits(x) & 0x7f800000) != 0x7f800000;
      if (ptx::load_shared<uint32_t>(word_of(v, i)) >> (i % 32) & 1) continue;
      ++left;
      if (symmetric && x < 0) x = -x;
      high.add(x, i);
      low.add(-x, i);
    }
    finite = ptx::all(finite);
    high.merge();
    low.merge();
    for (int mask = 1; mask <= 16; mask *= 2) left += ptx::shuffle_xor(left, mask);
    const double least = symmetric ? 0 : -double(low.first), next_least = symmetric ? 0 : -double(low.second);
    const double span = double(high.first) - least;
    const double without_high = double(high.second) - least, without_low = double(high.first) - next_least;
    const bool top = symmetric || without_high <= without_low;
    const double after = top ? without_high : without_low;
    if (lane == 0) {
      ptx::store_shared(gains + 8 * v, left > 1 && finite ? (span - after) * (span + after) : -1.0);
      ptx::store_shared(place_of(v), top ? high.at : low.at);
    }
  }

  TERSOR_DEVICE void run(int count) const {
    const int lane = threadIdx.x % 32;
    for (int v = 0; v < vectors; ++v) look_at(v);
    for (int n = 0; n < count; ++n) {
      ptx::sync_warp();
      double best = -1;
      int of = INT32_MAX;
      for (int v = lane; v < vectors; v += 32) {
        const double gain = ptx::load_shared<double>(gains + 8 * v);
        if (gain > best) {
          best = gain;
          of = v;
        }
      }
      for (int mask = 1; mask <= 16; mask *= 2) {
        const double other = ptx::shuffle_xor(best, mask);
        const int other_of = ptx::shuffle_xor(of, mask);
        if (other > best || (other == best && other_of < of)) {
          best = other;
          of = other_of;
        }
      }
      if (!(best > 0)) return;
      const int i = ptx::load_shared<int>(place_of(of));
      ptx::sync_warp();
      if (lane == 0) {
        ptx::store_shared(word_of(of, i), ptx::load_shared<uint32_t>(word_of(of, i)) | 1u << (i % 32));
      }
      ptx::sync_warp();
      look_at(of);
    }
  }
};

}  // namespace tersor
