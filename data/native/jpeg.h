// Baseline JPEGs decoded to the bits of libjpeg-turbo with its slow inverse DCT and fancy upsampling.

#pragma once

#include <vector>

#include "jpeg_header.h"

namespace convneur::jpeg {

// A rectangle of pixels.
struct Box {
    int top, left, height, width;
};

// Decodes a rectangle that lies in the image to RGB, rows `stride` bytes apart; false if the file isn't taken: it isn't
// a baseline JPEG, or, unless it is `proven`, anything is odd anywhere in it. Of a proven file, one that was decoded
// whole before, only what the rectangle needs is read. Throws std::bad_alloc.
bool decode(const uint8_t* bytes, size_t size, bool proven, const Box& box, uint8_t* out, ptrdiff_t stride);

// Reads all quantised coefficients; false if the file isn't taken. Component c has mcus_across * across blocks by
// mcus_down * down, those that only fill up MCUs included, row by row; a block has its 64 coefficients in the order of
// the zigzag, as Header's quantisers are. Throws std::bad_alloc.
bool read_coefficients(const uint8_t* bytes, size_t size, Header& header, std::vector<int16_t> (&blocks)[3]);

}  // namespace convneur::jpeg
