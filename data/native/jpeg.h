// Baseline JPEGs decoded to the bits of libjpeg-turbo with its slow inverse DCT and fancy upsampling.

#pragma once

#include "jpeg_scan.h"

namespace convneur::jpeg {

// Decodes a rectangle that lies in the image to RGB, rows `stride` bytes apart; false if the file isn't taken: it isn't
// a baseline JPEG, or, unless it is `proven`, anything is odd anywhere in it. Of a proven file, one that was decoded
// whole before, only what the rectangle needs is read. Throws std::bad_alloc.
bool decode(const uint8_t* bytes, size_t size, bool proven, const Box& box, uint8_t* out, ptrdiff_t stride);

}  // namespace convneur::jpeg
