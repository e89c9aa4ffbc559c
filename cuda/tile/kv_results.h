// What becomes of a row tile's sums: from four warps, and from several splits, to outputs and log-sum-exps.
#pragma once

#include "tile/kv_rows.h"

namespace tersor {

// Sums of a block lie in shared memory as floats [kRows][kPitch], and for each warp and row a maximum and a total.
template <int kDim, int kRows>
struct KvResults : KvRows<kDim, kRows> {
  using Rows = KvRows<kDim, kRows>;
  using Rows::a;
  using Four = ptx::Vec<float, 4>;
  using Two = ptx::Vec<float, 2>;
  static constexpr int kPitch = kDim + 8;  // half warps write rows without bank conflicts
  static constexpr int kThreads = 32 * kKvWarps, kFours = kRows * kDim / 4, kRowFours = kDim / 4;
  static constexpr int kStatistics = 4 * kRows * kPitch, kFlag = kStatistics + 8 * kKvWarps * kRows;
  static constexpr int kBytes = kFlag + 4;

  const ptx::shared_t sums;

  TERSOR_DEVICE KvResults(const KvAttentionArguments& arguments, int tile, ptx::shared_t memory)
      : Rows{arguments, tile}, sums(memory) {}

  TERSOR_DEVICE ptx::shared_t sum_at(int row, int channel) const { return sums + 4 * (row * kPitch + channel); }
  TERSOR_DEVICE ptx::shared_t statistics_at(int warp, int row) const {
    return sums + kStatistics + 8 * (warp * kRows + row);
  }

  // A row's maximum and total over the warps.
  TERSOR_DEVICE Two merged(int row) const {
    Two both[kKvWarps];
    float most = -infinity(), whole = 0;
#pragma unroll
    for (int w = 0; w < kKvWarps; ++w) {
      both[w] = ptx::load_shared<Two>(statistics_at(w, row));
      most = larger(both[w][0], most);
    }
#pragma unroll
    for (int w = 0; w < kKvWarps; ++w) whole += both[w][1] * ptx::exp2_approx(both[w][0] - reference_of(most));
    return {{most, whole}};
  }

  // Four channels of a row's output, with its log-sum-exp beside the first. The sink takes part in the denominator.
  TERSOR_DEVICE void finish(int row, Two both, const Four& sum, int channel) const {
    const int index = this->first_row() + row;
    if (index >= this->row_count()) return;
    const int head = this->query_head(index), query = index / a.group;
    float peak = both[0], whole = both[1], scale = 1;
    if (a.sinks != nullptr) {
      const float sink = ptx::load_global_constant(a.sinks + head) * kLog2E;
      const float most = larger(peak, sink);
      scale = ptx::exp2_approx(peak - reference_of(most));
      whole = whole * scale + ptx::exp2_approx(sink - reference_of(most));
      peak = most;
    }
    const float each = whole == 0 ? 0.0f : scale / whole;  // a NaN stays one
    Vec2 pairs;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float x = sum[2 * half] * each, y = sum[2 * half + 1] * each;
      pairs[half] = a.is_bfloat16 ? BFloat16::pack(x, y) : Float16::pack(x, y);
    }
    const int64_t to = ((int64_t(this->sequence()) * a.queries + query) * a.heads + head) * kDim + channel;
    ptx::store_global(reinterpret_cast<Vec2*>(static_cast<uint16_t*>(a.out) + to), pairs);
    if (channel == 0 && a.log_sum_exp != nullptr) {
      const int64_t at = (int64_t(this->sequence()) * a.heads + head) * a.queries + query;
      ptx::store_global(a.log_sum_exp + at, whole == 0 ? -infinity() : (peak + log2f(whole)) * kLn2);
    }
  }

  TERSOR_DEVICE void write() const {
    for (int i = threadIdx.x; i < kFours; i += kThreads) {
      const int row = i / kRowFours, channel = i % kRowFours * 4;
      finish(row, merged(row), ptx::load_shared<Four>(sum_at(row, channel)), channel);
    }
  }

  // Leaves the block's results for the last of the row tile's blocks, which adds all in the order of the splits: nobody
  // waits, and the sum is the same whoever is last. The counter wraps to zero, ready for the next launch.
  TERSOR_DEVICE void write_with_splits() const {
    const int64_t place = int64_t(this->sequence()) * gridDim.y + blockIdx.y;
    float* slots = a.partials + place * a.splits * kv_partial_floats(kDim, kRows);
    float* own = slots + blockIdx.x * kv_partial_floats(kDim, kRows);
    for (int i = threadIdx.x; i < kFours; i += kThreads) {
      ptx::store_global(reinterpret_cast<Four*>(own) + i,
                        ptx::load_shared<Four>(sum_at(i / kRowFours, i % kRowFours * 4)));
    }
    if (threadIdx.x < kRows) {
      ptx::store_global(reinterpret_cast<Two*>(own + kRows * kDim) + threadIdx.x, merged(threadIdx.x));
    }
    ptx::barrier();
    if (threadIdx.x == 0) {
      ptx::fence();  // what the block stored before the barrier, before the arrival
      const uint32_t arrived = ptx::atomic_inc_wrap(a.counters + place, a.splits - 1);
      ptx::fence();  // the others' arrivals, before their sums are read
      ptx::store_shared<uint32_t>(sums + kFlag, arrived);
    }
    ptx::barrier();
    if (ptx::load_shared<uint32_t>(sums + kFlag) != uint32_t(a.splits - 1)) return;
    for (int i = threadIdx.x; i < kFours; i += kThreads) merge_splits(slots, i);
  }

 private:
  using Vec2 = ptx::Vec<uint32_t, 2>;

  // Four channels of a row over all splits. One with a higher maximum brings the sums before it to its own.
  TERSOR_DEVICE void merge_splits(const float* slots, int i) const {
    const int row = i / kRowFours, channel = i % kRowFours * 4;
    Two both = {{-infinity(), 0}};
    Four sum = {{0, 0, 0, 0}};
    constexpr int at_once = 4;  // loads that are under way together, the last split's in place of none
    for (int first = 0; first < a.splits; first += at_once) {
      Two their_both[at_once];
      Four theirs[at_once];
#pragma unroll
      for (int s = 0; s < at_once; ++s) {
        const int split = first + s < a.splits ? first + s : a.splits - 1;
        const float* slot = slots + split * kv_partial_floats(kDim, kRows);
        their_both[s] = ptx::load_global_volatile(reinterpret_cast<const Two*>(slot + kRows * kDim) + row);
        theirs[s] = ptx::load_global_volatile(reinterpret_cast<const Four*>(slot) + i);
      }
#pragma unroll
      for (int s = 0; s < at_once; ++s) {
        if (first + s >= a.splits) break;
        const float most = larger(their_both[s][0], both[0]), reference = reference_of(most);
        const float before = ptx::exp2_approx(both[0] - reference);
        const float factor = ptx::exp2_approx(their_both[s][0] - reference);
        both[0] = most;
        both[1] = both[1] * before + their_both[s][1] * factor;
#pragma unroll
        for (int n = 0; n < 4; ++n) sum[n] = sum[n] * before + theirs[s][n] * factor;
      }
    }
    finish(row, both, sum, channel);
  }
};

}  // namespace tersor
