// KV caches as planes from Python: a layout, and the blocks of one sequence in arrays that this keeps alive.
#pragma once

#include <optional>

#include "apis/check.hpp"
#include "apis/planes_cache.hpp"
#include "bindings/bindings.hpp"
#include "bindings/buffers.hpp"

namespace taper {

class PlanesBlocks {
 public:
  // upper, lower: (blocks, bytes of a part); table: (2, blocks of the sequence) rows of them, -1 where there is none.
  PlanesBlocks(nb::handle layout, nb::handle upper, nb::handle lower, nb::handle table, nb::handle bits, int64_t window)
      : held_(nb::borrow(layout)),
        layout_(nb::cast<const PlanesLayout&>(layout)),
        upper_(upper, "upper", {Dtype::u8}, 2, true),
        table_(borrow<int32_t>(table, "table", 2)),
        bits_(borrow<uint8_t>(bits, "bits", 2)),
        window_(window) {
    require(upper_.shape(1) == layout_.upper_bytes(), "upper has rows of ", upper_.shape(1), " bytes, expected ",
            layout_.upper_bytes());
    require(table_.shape(0) == 2, "table has ", table_.shape(0), " rows, expected 2");
    require(bits_.shape(0) == layout_.layers() && bits_.shape(1) == 4, "bits has shape (", bits_.shape(0), ", ",
            bits_.shape(1), "), expected (", layout_.layers(), ", 4)");
    require(lower.is_none() == (layout_.lower_bytes() == 0), "a lower part is needed just where the layout has one");
    if (lower.is_none()) return;
    lower_.emplace(Buffer(lower, "lower", {Dtype::u8}, 2, true));
    require(lower_->shape(1) == layout_.lower_bytes(), "lower has rows of ", lower_->shape(1), " bytes, expected ",
            layout_.lower_bytes());
  }

  PlanesBlocks(const PlanesBlocks&) = delete;

  // The blocks of the first `end` entries.
  PlanesTable table(int64_t end) const {
    const int64_t count = (end + kBlockEntries - 1) / kBlockEntries;
    require(end >= 0 && count <= table_.shape(1), "position ", end - 1, " is outside a KV cache of ",
            table_.shape(1) * kBlockEntries);
    PlanesTable made{&layout_, {}, {}, reinterpret_cast<const ReadBits*>(bits_.as<uint8_t>()), window_};
    for (int64_t b = 0; b < count; ++b) {
      made.upper.push_back(row(upper_, table_.as<int32_t>()[b]));
      require(made.upper.back() != nullptr, "block ", b, " of the KV cache has no memory");
      if (lower_) made.lower.push_back(row(*lower_, table_.as<int32_t>()[table_.shape(1) + b]));
    }
    return made;
  }

 private:
  static uint8_t* row(const Buffer& parts, int32_t index) {
    require(index < parts.shape(0), "block part ", index, " is outside a pool of ", parts.shape(0));
    return index < 0 ? nullptr : static_cast<uint8_t*>(parts.data()) + index * parts.shape(1);
  }

  nb::object held_;
  const PlanesLayout& layout_;
  Buffer upper_, table_, bits_;
  std::optional<Buffer> lower_;
  int64_t window_;
};

}  // namespace taper
