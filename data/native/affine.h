// Pillow's affine transforms.
#pragma once

#include "operations.h"

namespace convneur {

// Output (x, y) is taken from (a x + b y + c, d x + e y + f), of middles of pixels.
struct Matrix {
    double a, b, c, d, e, f;
};

// As `Image.transform(size, AFFINE, matrix, resample, fillcolor=fill)`, bicubic or bilinear.
void transform(const Picture& picture, const Matrix& matrix, bool is_cubic, const uint8_t* fill);

// As `Image.rotate`, shortcuts included.
void rotate(const Picture& picture, double degrees, double cosine, double sine, bool is_cubic, const uint8_t* fill);

}  // namespace convneur
