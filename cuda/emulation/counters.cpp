// Counts what a launch does to memory: bytes and widths per buffer, sectors, bank conflicts, per region.
//
// A warp-wide access is put together from its lanes' calls: the n-th access of each lane from one place of the
// compiled kernel (the return address) since the warp was last together (a collective or a barrier). Lanes
// that took another path, or none, leave the group incomplete; it is then counted for the lanes it has.
// Sectors are those of a buffer that starts at a multiple of 32 bytes, as device allocations do.
#include <algorithm>
#include <cstdio>
#include <memory>

#include "emulation/internal.h"

namespace tersor {
namespace emulation {

struct Access {
  uint64_t address;
  uint8_t lane;
  uint8_t bytes;
};

struct Group {  // one warp-wide access in the making
  uint32_t mask = 0;
  Access lanes[32];
};

struct Site {
  const void* place = nullptr;
  uint64_t epoch = 0;
  int space = 0;   // SharedKind, or kinds + buffer * 2 + store
  int region = 0;
  int width = 0;
  uint32_t seen[32] = {};    // accesses of each lane in this epoch
  uint32_t first = 0;        // occurrence of groups[0]
  std::vector<Group> groups;
};

struct WarpSites {
  uint64_t epoch = 1;
  std::vector<Site> table;  // open addressing by place
  std::vector<uint32_t> used;
};

namespace {

constexpr int widths = 5;  // 1, 2, 4, 8, 16 bytes
constexpr int kinds = 4;
const char* const kind_names[kinds] = {"load", "store", "copy", "matrix"};
constexpr int all_mma_kinds = mma_kinds + float_mma_kinds;
const char* const mma_names[all_mma_kinds] = {"m16n8k16_f16",     "m16n8k16_bf16",  "m16n8k32_s8",
                                              "m16n8k64_s4",      "m16n8k256_b1",   "sp_m16n8k32_f16",
                                              "sp_m16n8k32_bf16", "sp_m16n8k64_s8", "m16n8k32_e4m3",
                                              "m16n8k64_mxf4",    "m16n8k64_nvf4",
                                              "m16n8k32_mx_e4m3_e4m3", "m16n8k32_mx_e2m3_e4m3",
                                              "m16n8k32_mx_e2m1_e4m3", "m16n8k32_mx_e4m3_e2m3",
                                              "m16n8k32_mx_e2m3_e2m3", "m16n8k32_mx_e2m1_e2m3"};

struct Traffic {
  uint64_t loaded = 0, stored = 0, repeated = 0, requests = 0, sectors = 0, minimum = 0;
  uint64_t load_width[widths] = {}, store_width[widths] = {};
};

struct Shared {
  uint64_t requests = 0, cycles = 0, extra = 0, bytes = 0;
};

struct Region {
  std::string name;
  uint64_t barriers = 0, mma[all_mma_kinds] = {};
  Shared shared[kinds];
  std::vector<Traffic> traffic;  // by buffer
};

struct Touched {
  std::string name;
  std::vector<uint8_t> loads;  // of each byte, at most 255
};

bool counting = true;
std::vector<Region> regions(1);
std::unordered_map<const void*, int> region_numbers;
std::vector<Touched> touched;
std::vector<std::unique_ptr<WarpSites>> sites;  // of all warps of the launch
uint64_t launches = 0;

int log2_of(int width) { return __builtin_ctz(static_cast<unsigned>(width)); }

// Cycles of one phase: the largest number of different words wanted from one bank.
int phase_cycles(const uint32_t* words, int n) {
  uint32_t bank_words[32][32];
  int counts[32] = {}, worst = 0;
  for (int i = 0; i < n; ++i) {
    const int bank = static_cast<int>(words[i] % 32);
    int j = 0;
    while (j < counts[bank] && bank_words[bank][j] != words[i]) ++j;
    if (j == counts[bank]) bank_words[bank][counts[bank]++] = words[i];
    worst = std::max(worst, counts[bank]);
  }
  return worst;
}

// 32 lanes at once for up to 4 bytes, half a warp for 8, a quarter for 16.
void finish_shared(Region& region, int kind, int width, const Group& group) {
  Shared& counts = region.shared[kind];
  ++counts.requests;
  const int lanes = width <= 4 ? 32 : 128 / width, words = width <= 4 ? 1 : width / 4;
  for (int from = 0; from < 32; from += lanes) {
    uint32_t wanted[32];
    int n = 0;
    for (int lane = from; lane < from + lanes; ++lane)
      if (group.mask >> lane & 1)
        for (int w = 0; w < words; ++w) wanted[n++] = static_cast<uint32_t>(group.lanes[lane].address / 4) + w;
    if (n == 0) continue;
    const int cycles = phase_cycles(wanted, n);
    counts.cycles += cycles;
    counts.extra += cycles - 1;
  }
}

void finish_global(Region& region, int buffer, const Group& group) {
  Access sorted[32];
  int n = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (group.mask >> lane & 1) sorted[n++] = group.lanes[lane];
  std::sort(sorted, sorted + n, [](const Access& a, const Access& b) { return a.address < b.address; });
  uint64_t end = 0, bytes = 0, next_sector = 0, sectors = 0;
  for (int i = 0; i < n; ++i) {
    const uint64_t from = std::max(sorted[i].address, end), to = sorted[i].address + sorted[i].bytes;
    if (to <= from) continue;
    bytes += to - from;
    end = to;
    const uint64_t first = std::max(from / 32, next_sector), last = (to - 1) / 32;
    if (last >= first) {
      sectors += last - first + 1;
      next_sector = last + 1;
    }
  }
  Traffic& t = region.traffic[buffer];
  ++t.requests;
  t.sectors += sectors;
  t.minimum += (bytes + 31) / 32;
}

void finish_group(const Site& site, const Group& group) {
  if (!group.mask) return;
  Region& region = regions[site.region];
  if (site.space < kinds)
    finish_shared(region, site.space, site.width, group);
  else
    finish_global(region, (site.space - kinds) / 2, group);
}

Site& find_site(WarpSites& warp, const void* place, int space) {
  if (warp.table.empty()) warp.table.resize(64);
  const size_t mask = warp.table.size() - 1;
  size_t i = (reinterpret_cast<uintptr_t>(place) * 0x9e3779b97f4a7c15ull >> 40) + static_cast<size_t>(space);
  for (size_t probes = 0; probes < warp.table.size(); ++probes, ++i) {
    Site& site = warp.table[i & mask];
    if (site.place == place && site.space == space) return site;
    if (!site.place) {
      if (warp.used.size() * 2 >= warp.table.size()) break;
      site.place = place;
      site.space = space;
      warp.used.push_back(static_cast<uint32_t>(i & mask));
      return site;
    }
  }
  std::vector<Site> old(warp.table.size() * 2);
  old.swap(warp.table);
  warp.used.clear();
  for (Site& site : old)
    if (site.place) find_site(warp, site.place, site.space) = std::move(site);
  return find_site(warp, place, space);
}

void add(int space, const void* place, int width, const Access& access) {
  WarpSites*& all = current->warp->sites;
  if (!all) {
    sites.push_back(std::make_unique<WarpSites>());
    all = sites.back().get();
  }
  Site& site = find_site(*all, place, space);
  if (site.epoch != all->epoch) {
    site.epoch = all->epoch;
    site.region = current->region;
    site.width = width;
    std::fill(site.seen, site.seen + 32, 0u);
    site.first = 0;
    site.groups.clear();
  }
  const uint32_t occurrence = site.seen[access.lane]++;
  const uint32_t at = occurrence - site.first;
  if (at >= site.groups.size()) site.groups.resize(at + 1);
  Group& group = site.groups[at];
  group.mask |= 1u << access.lane;
  group.lanes[access.lane] = access;
  if (group.mask == 0xffffffffu) {
    finish_group(site, group);
    group.mask = 0;
    if (at == 0) {
      // All lanes are past it: drop it, and complete ones behind it.
      const uint32_t least = *std::min_element(site.seen, site.seen + 32);
      const size_t complete = std::min<size_t>(least - site.first, site.groups.size());
      site.groups.erase(site.groups.begin(), site.groups.begin() + static_cast<std::ptrdiff_t>(complete));
      site.first = least;
    }
  }
}

void append(std::string& text, const char* name, uint64_t value, bool comma = true) {
  char item[96];
  std::snprintf(item, sizeof item, "\"%s\": %llu%s", name, static_cast<unsigned long long>(value), comma ? ", " : "");
  text += item;
}

void append_widths(std::string& text, const char* name, const uint64_t* counts) {
  text += std::string("\"") + name + "\": {";
  for (int w = 0; w < widths; ++w) append(text, std::to_string(1 << w).c_str(), counts[w], w + 1 < widths);
  text += "}";
}

void add_to(Region& total, const Region& part) {
  total.barriers += part.barriers;
  for (int i = 0; i < all_mma_kinds; ++i) total.mma[i] += part.mma[i];
  for (int i = 0; i < kinds; ++i) {
    total.shared[i].requests += part.shared[i].requests;
    total.shared[i].cycles += part.shared[i].cycles;
    total.shared[i].extra += part.shared[i].extra;
    total.shared[i].bytes += part.shared[i].bytes;
  }
  if (total.traffic.size() < part.traffic.size()) total.traffic.resize(part.traffic.size());
  for (size_t i = 0; i < part.traffic.size(); ++i) {
    Traffic& t = total.traffic[i];
    const Traffic& p = part.traffic[i];
    t.loaded += p.loaded;
    t.stored += p.stored;
    t.repeated += p.repeated;
    t.requests += p.requests;
    t.sectors += p.sectors;
    t.minimum += p.minimum;
    for (int w = 0; w < widths; ++w) {
      t.load_width[w] += p.load_width[w];
      t.store_width[w] += p.store_width[w];
    }
  }
}

void append_region(std::string& text, const Region& region) {
  text += "{";
  append(text, "barriers", region.barriers);
  text += "\"mma\": {";
  bool first = true;
  for (int i = 0; i < all_mma_kinds; ++i)
    if (region.mma[i]) {
      if (!first) text += ", ";
      append(text, mma_names[i], region.mma[i], false);
      first = false;
    }
  text += "}, \"shared\": {";
  Shared sum;
  for (int i = 0; i < kinds; ++i) {
    const Shared& s = region.shared[i];
    text += std::string("\"") + kind_names[i] + "\": {";
    append(text, "requests", s.requests);
    append(text, "cycles", s.cycles);
    append(text, "extra_cycles", s.extra);
    append(text, "bytes", s.bytes, false);
    text += "}, ";
    sum.extra += s.extra;
    sum.cycles += s.cycles;
  }
  append(text, "cycles", sum.cycles);
  append(text, "extra_cycles", sum.extra, false);
  text += "}, \"global\": {";
  first = true;
  for (size_t i = 0; i < region.traffic.size(); ++i) {
    const Traffic& t = region.traffic[i];
    if (!t.requests && !t.loaded && !t.stored) continue;
    if (!first) text += ", ";
    first = false;
    text += "\"" + touched[i].name + "\": {";
    append(text, "loaded", t.loaded);
    append(text, "stored", t.stored);
    append(text, "repeated", t.repeated);
    append(text, "requests", t.requests);
    append(text, "sectors", t.sectors);
    append(text, "minimum_sectors", t.minimum);
    append_widths(text, "load_widths", t.load_width);
    text += ", ";
    append_widths(text, "store_widths", t.store_width);
    text += "}";
  }
  text += "}}";
}

std::string escaped(const std::string& name) {
  std::string result;
  for (char c : name) {
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) >= 32) result += c;
  }
  return result;
}

}  // namespace

void region(const char* name) {
  const auto known = region_numbers.find(name);
  if (known != region_numbers.end()) {
    current->region = known->second;
    return;
  }
  int number = 0;
  while (number < static_cast<int>(regions.size()) && regions[number].name != name) ++number;
  if (number == static_cast<int>(regions.size())) {
    regions.emplace_back();
    regions.back().name = name;
    regions.back().traffic.resize(touched.size());
  }
  region_numbers[name] = number;
  current->region = number;
}

void count_shared(SharedKind kind, const void* site, uint32_t address, int bytes) {
  if (!counting) return;
  regions[current->region].shared[static_cast<int>(kind)].bytes += bytes;
  add(static_cast<int>(kind), site, bytes, {address, static_cast<uint8_t>(current->lane), static_cast<uint8_t>(bytes)});
}

void count_matrix_rows(const uint32_t* rows, int count) {
  if (!counting) return;
  Shared& counts = regions[current->region].shared[static_cast<int>(SharedKind::matrix)];
  ++counts.requests;
  counts.bytes += 16 * count;
  for (int i = 0; i < count; i += 8) {
    uint32_t words[32];
    for (int r = 0; r < 8; ++r)
      for (int w = 0; w < 4; ++w) words[r * 4 + w] = rows[i + r] / 4 + w;
    const int cycles = phase_cycles(words, 32);
    counts.cycles += cycles;
    counts.extra += cycles - 1;
  }
}

void count_global(bool store, const void* site, int buffer, uint64_t offset, int width, int bytes) {
  if (!counting) return;
  Traffic& t = regions[current->region].traffic[buffer];
  if (store) {
    t.stored += bytes;
    t.store_width[log2_of(width)] += bytes;
  } else {
    t.loaded += bytes;
    t.load_width[log2_of(width)] += bytes;
    uint8_t* loads = touched[buffer].loads.data() + offset;
    for (int i = 0; i < bytes; ++i) {
      t.repeated += loads[i] != 0;
      loads[i] += loads[i] != 255;
    }
  }
  add(kinds + buffer * 2 + (store ? 1 : 0), site, width,
      {offset, static_cast<uint8_t>(current->lane), static_cast<uint8_t>(bytes)});
}

void count_barrier() {
  if (counting) ++regions[current->region].barriers;
}

void count_mma(Mma kind) {
  if (counting) ++regions[current->region].mma[static_cast<int>(kind)];
}

void count_float_mma(int kind) {
  if (counting) ++regions[current->region].mma[mma_kinds + kind];
}

void count_launch() {
  ++launches;
  sites.clear();
}

void meet_warp(Warp& warp) {
  if (!warp.sites) return;
  WarpSites& all = *warp.sites;
  for (uint32_t i : all.used) {
    Site& site = all.table[i];
    if (site.epoch != all.epoch) continue;
    for (const Group& group : site.groups) finish_group(site, group);
    site.groups.clear();
  }
  ++all.epoch;
}

void register_counts(int buffer, const char* name, size_t bytes) {
  touched.resize(static_cast<size_t>(buffer) + 1);
  touched[buffer].name = escaped(name);
  touched[buffer].loads.assign(bytes, 0);
  for (Region& region : regions) region.traffic.resize(touched.size());
}

void clear_counts() {
  regions.assign(1, Region());
  region_numbers.clear();
  touched.clear();
  sites.clear();
  launches = 0;
}

}  // namespace emulation
}  // namespace tersor

extern "C" {

void emulation_count(int on) { tersor::emulation::counting = on != 0; }

size_t emulation_counters(char* json, size_t size) {
  using namespace tersor::emulation;
  std::string text = "{";
  append(text, "launches", launches);
  Region total;
  total.traffic.resize(touched.size());
  for (const Region& region : regions) add_to(total, region);
  text += "\"total\": ";
  append_region(text, total);
  text += ", \"regions\": {";
  for (size_t i = 0; i < regions.size(); ++i) {
    if (i) text += ", ";
    text += "\"" + escaped(regions[i].name) + "\": ";
    append_region(text, regions[i]);
  }
  text += "}}";
  if (json && size) {
    const size_t n = std::min(size - 1, text.size());
    text.copy(json, n);
    json[n] = 0;
  }
  return text.size() + 1;
}
}
