// OpenCV's INTER_AREA where it shrinks both sides.
#pragma once

#include "resize.h"

namespace convneur {

// The inputs of outputs first ... first + count - 1 along an axis, for a side that doesn't grow.
void area_support(int in_size, int out_size, int first, int count, int& begin, int& end);

// As `make_resized`, for kArea; false where a side grows.
bool make_area(const Resize& resize, const uint8_t* pixels, ptrdiff_t stride, Box held, uint8_t* out,
               ptrdiff_t out_stride);

}  // namespace convneur
