// OpenCV's INTER_AREA: means over areas where no side grows, else something like bilinear interpolation.
#pragma once

#include "resize.h"

namespace convneur {

Box area_support(const Resize& resize);

// As `make_resized`, of a buffer that begins with the support, which is `needed`.
void make_area(const Resize& resize, Box needed, const uint8_t* pixels, ptrdiff_t stride, uint8_t* out,
               ptrdiff_t out_stride);

}  // namespace convneur
