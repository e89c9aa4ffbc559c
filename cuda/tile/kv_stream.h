// The pages of one warp as a stream of units of about 2 KB, copied ahead into a ring of its own in shared memory.
#pragma once

#include "ptx/math.h"
#include "ptx/ptx.h"
#include "tile/kv_layout.h"

namespace tersor {

constexpr int kKvWarps = 4;    // of a block; each takes every fourth page
constexpr int kKvListed = 32;  // entries of pages in the list of a warp
constexpr int kKvScanned = 16;  // entries of the table that are looked at together

// Records that make a unit: of keys, and of one group of values. Pages of formats have more beside their codes.
__host__ __device__ constexpr int kv_unit_records(int dim, int bits, bool formats = false) {
  const int records = formats && dim % 64 != 0 ? 3 : kv_group_records(dim);
  return bits <= 4 ? records : bits == 8 ? (records + 1) / 2 : 1;
}
constexpr int kv_slot_bytes(int dim, bool formats = false) {
  int most = 0;
  for (int bits = 2; bits <= 16; ++bits) {
    const int records = kv_unit_records(dim, bits, formats), least = kv_least_group_records(dim);
    const int keys = records * kv_key_record_bytes(bits, false, formats);
    const int values = records * kv_value_record_bytes(bits, formats) + (bits < 16 ? kKvValueParameters : 0);
    const int groups = formats && bits < 16 && records > least ? records / least : 1;  // of a unit
    const int grouped = records * kv_value_record_bytes(bits) + groups * kKvValueParameters;
    if (kv_bits_exist(bits) && keys > most) most = keys;
    if (kv_bits_exist(bits) && values > most) most = values;
    if (kv_bits_exist(bits) && bits < 16 && grouped > most) most = grouped;
  }
  return most;
}
// Outliers that a page and head may have: their tails are units.
constexpr int kv_most_key_outliers(int dim) {
  return (kv_slot_bytes(dim, true) - 4 * kKvTokens - kv_outlier_starts_bytes(kKvTokens / 2)) / 4;
}
constexpr int kv_most_value_outliers(int dim) {
  return (kv_slot_bytes(dim, true) - kv_outlier_starts_bytes(dim / 2)) / 4;
}
// Shared memory of a warp: the ring, then the list.
constexpr int kv_stream_bytes(int dim, int slots, bool formats = false) {
  return slots * kv_slot_bytes(dim, formats) + kKvListed * static_cast<int>(sizeof(KvPage));
}

// Entries of the table are scanned ahead; those with tokens from `from` to `to` come into the list, which the unit's
// user reads a few pages later. In the order of the list: the units of a page's keys, one with their tail and one with
// that of the values, where they exist, then those of each group of values (kValues); a unit begins with the parameters
// that lie before its codes.
template <int kDim, int kSlots, bool kFormats, bool kValues>
class KvStream {
 public:
  static constexpr int kSlotBytes = kv_slot_bytes(kDim, kFormats);

  // `entries` of `table`, one of every kKvWarps from `scan` on to before `end`. `formats`: [kKvFormats], if kFormats.
  TERSOR_DEVICE KvStream(ptx::shared_t memory, const KvPage* table, int head, int scan, int end,
                         const KvFormat* formats = nullptr, bool biased = false)
      : ring_(memory), table_(table), head_(head), formats_(formats), biased_(biased), scan_(scan), end_(end) {}

  TERSOR_DEVICE int listed() const { return listed_; }
  TERSOR_DEVICE KvPage page(int index) const { return ptx::load_shared<KvPage>(list_entry(index)); }

  // Fills the ring.
  TERSOR_DEVICE void start(int from, int to) {
    for (int i = 0; i < kSlots - 1; ++i) fetch(from, to);
  }

  // The next unit, which has landed. The slot read before it is given to the unit that is fetched now.
  TERSOR_DEVICE ptx::shared_t next(int from, int to) {
    ptx::cp_async_wait<kSlots - 2>();
    ptx::sync_warp();  // every lane's copies are there, and none reads the slot before any more
    fetch(from, to);
    return ring_ + slot_ * kSlotBytes;  // the slot after the one that was given away
  }

 private:
  TERSOR_DEVICE ptx::shared_t list_entry(int index) const {
    return ring_ + kSlots * kSlotBytes + index % kKvListed * static_cast<int>(sizeof(KvPage));
  }

  // The next pages of the table that are seen go to the list. There they overwrite pages that were used long ago: no
  // more than kSlots are between what is fetched and what is used.
  TERSOR_DEVICE void list_pages(int from, int to) {
    static_assert(kKvScanned + kSlots <= kKvListed, "pages that are listed are not overwritten before they are used");
    const int lane = threadIdx.x % 32;
    while (fetched_ == listed_ && scan_ < end_) {
      const int entry = scan_ + kKvWarps * lane;
      const bool inside = lane < kKvScanned && entry < end_;
      KvPage page = {};
      if (inside) page = ptx::load_global_constant(table_ + entry);
      const bool seen = page.tokens > 0 && page.position + page.tokens > from && page.position <= to;
      const uint32_t found = ptx::ballot(seen);
      const int before = ptx::count_bits(found & ((1u << lane) - 1));
      if (seen) ptx::store_shared(list_entry(listed_ + before), page);
      listed_ += ptx::count_bits(found);
      scan_ += kKvScanned * kKvWarps;
    }
    ptx::sync_warp();
  }

  // A part is `runs_` runs of bytes (the keys, a tail, or the groups of values), each taken as units.
  TERSOR_DEVICE void begin_run(int from, int to) {
    if (runs_ == 0) {
      if (kFormats && tails_ != 0) {
        const int of_keys = tails_ & 0xffff;
        runs_ = 1;
        run_bytes_ = step_ = of_keys != 0 ? of_keys : tails_ >> 16;
        extra_ = 0;
        tails_ = of_keys != 0 ? tails_ - of_keys : 0;
      } else if (values_ != 0) {
        const int bits = kFormats ? values_ & 0xff : values_;
        const bool separable = kFormats && (values_ & kSeparable) != 0;
        const int records = kFormats ? values_ >> kRecordsShift : 0, unit = kv_unit_records(kDim, bits, kFormats);
        runs_ = kv_value_groups(kDim, records);
        run_bytes_ = kv_value_group_bytes(kDim, bits, records, separable);
        step_ = unit * kv_value_record_bytes(bits, separable);
        extra_ = bits < 16 ? kKvValueParameters : 0;
        if (kFormats && records > 0 && records < unit) {  // several groups a unit, all of them a run
          run_bytes_ *= runs_;
          step_ += unit / records * extra_;
          runs_ = 1;
          extra_ = 0;
        }
        values_ = 0;
      } else {
        if (fetched_ == listed_) list_pages(from, to);
        if (fetched_ == listed_) return;
        begin_page(ptx::load_shared<KvPage>(list_entry(fetched_)));
        ++fetched_;
      }
    }
    --runs_;
    left_ = run_bytes_;
  }

  TERSOR_DEVICE void begin_page(const KvPage& page) {
    const int key_bits = page.key_bits;
    source_ = reinterpret_cast<const char*>(page.address);
    extra_ = 0;
    if constexpr (kFormats) {
      const KvFormat& f = formats_[page.format];
      source_ += int64_t(head_) * kv_page_bytes(kDim, key_bits, page.value_bits, f, biased_);
      run_bytes_ = kv_key_bytes(kDim, key_bits, f.key_token, f.key_halves);
      step_ = kv_unit_records(kDim, key_bits, true) * kv_key_record_bytes(key_bits, f.key_token, f.key_halves);
      if (f.key_token && key_bits < 16) extra_ = kKvValueParameters;
      tails_ = kv_key_tail_bytes(f.key_outliers, biased_);
      if (kValues) tails_ |= kv_value_tail_bytes(kDim, f.value_outliers) << 16;
      values_ = kValues ? page.value_bits | (f.separable ? kSeparable : 0) | f.value_records << kRecordsShift : 0;
    } else {
      source_ += int64_t(head_) * kv_page_bytes(kDim, key_bits, page.value_bits);
      run_bytes_ = kv_key_bytes(kDim, key_bits);
      step_ = kv_unit_records(kDim, key_bits) * kv_key_record_bytes(key_bits);
    }
    runs_ = 1;
    if (!kFormats) values_ = kValues ? page.value_bits : 0;
  }

  // Starts the copies of the next unit; commits a group also where there is none left, since waits count groups.
  TERSOR_DEVICE void fetch(int from, int to) {
    if (left_ == 0) begin_run(from, to);
    const int unit = left_ == run_bytes_ ? step_ + extra_ : step_;
    const int bytes = unit < left_ ? unit : left_;
    const int mine = threadIdx.x % 32 * 16;
    const ptx::shared_t slot = ring_ + slot_ * kSlotBytes + mine;
#pragma unroll
    for (int i = 0; i < kSlotBytes; i += 512) {
      if (mine + i < bytes) ptx::cp_async_16(slot + i, source_ + mine + i);
    }
    source_ += bytes;
    left_ -= bytes;
    slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1;
    ptx::cp_async_commit();
  }

  const ptx::shared_t ring_;
  const KvPage* const table_;
  const int head_;
  const KvFormat* const formats_;
  const bool biased_;
  int scan_, end_, listed_ = 0, fetched_ = 0;
  const char* source_ = nullptr;
  int left_ = 0, step_ = 0, extra_ = 0, run_bytes_ = 0, runs_ = 0;
  // Of the page, as long as they have not begun: bytes of the tails of keys and, 16 bits up, of values; and the values'
  // bits, with what else is to be known of them.
  static constexpr int kSeparable = 0x100, kRecordsShift = 9;
  int tails_ = 0, values_ = 0;
  int slot_ = 0;
};

}  // namespace tersor
