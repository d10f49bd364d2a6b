// Rows of pixels that whole registers can be read from.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace convneur {

// Where 4 x quads pixels from `start` are read within a row of `width`, if it has as many: earlier, at its end.
inline int readable_start(int start, int width, int quads) { return std::max(0, std::min(start, width - 4 * quads)); }

// Rows from each of whose `readable_start`s quads x 12 + 4 bytes can be read: the last bytes lie in the next row, or
// in a copy. Only one such object is used at a time in a thread.
class ReadableRows {
public:
    ReadableRows(const uint8_t* pixels, ptrdiff_t stride, int rows, int width, int quads)
        : pixels_(pixels), stride_(stride), rows_(rows), width_(width), wide_(width >= 4 * quads && width >= 8) {
        const size_t bytes = 3 * static_cast<size_t>(width) + 12 * static_cast<size_t>(quads) + 16;
        if (copy().size() < bytes) copy().resize(bytes);
    }

    const uint8_t* row(int y) const {
        const uint8_t* found = pixels_ + y * stride_;
        if (wide_ && y < rows_ - 1) return found;
        std::memcpy(copy().data(), found, 3 * static_cast<size_t>(width_));
        return copy().data();
    }

private:
    static std::vector<uint8_t>& copy() {
        static thread_local std::vector<uint8_t> made;
        return made;
    }

    const uint8_t* pixels_;
    ptrdiff_t stride_;
    int rows_, width_;
    bool wide_;
};

}  // namespace convneur
