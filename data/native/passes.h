// The two passes of a resize: along rows and down columns, of interleaved 8-bit RGB.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weights.h"

namespace convneur {

constexpr int kMargin = 64;  // bytes that passes may write beyond the end of a row, and read beyond their sources' ends

// Along rows: `rows` rows of `width` pixels to as many of as many pixels as `axis` has outputs. `axis.starts` count
// from the first pixel. `out` holds kMargin bytes beyond each row that it is the last of: `out_stride` may be the row's
// own length, as later rows are written later.
void resize_rows(const uint8_t* pixels, ptrdiff_t stride, int rows, int width, const AxisWeights& axis, uint8_t* out,
                 ptrdiff_t out_stride);

// Down columns: row `i` of the outputs, of `bytes` values. `axis.starts` count from the first row.
void resize_column(const uint8_t* pixels, ptrdiff_t stride, int bytes, const AxisWeights& axis, int i, uint8_t* out);

}  // namespace convneur
