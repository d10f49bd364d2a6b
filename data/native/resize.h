// Resizing of 8-bit RGB, (height, width, 3), to the bits of Pillow 13's `Image.resize` and OpenCV's INTER_AREA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weights.h"

namespace convneur {

struct Box {
    int top, left, height, width;
};

// What becomes of an image of `height` x `width` pixels.
struct Resize {
    int height, width;
    Filter filter;
    int out_height, out_width;  // of the whole resized image
    Box window;                 // the part of it that is wanted
    bool hflip = false, vflip = false;  // of that part: left to right, top to bottom
};

// Whether it can be done: sides of at least a pixel and at most kLongest, the window within the resized image.
bool is_sound(const Resize& resize);

constexpr int kLongest = 1 << 16;

// The part of the image that the window is made of.
Box support(const Resize& resize);

// Makes the window, (window.height, window.width, 3), of a buffer that holds the part `held` of the image, which has
// the support; `pixels` is that part's first pixel. `out_stride` is in bytes, too. False where it isn't done: not
// sound, or the part held is too small.
bool make_resized(const Resize& resize, const uint8_t* pixels, ptrdiff_t stride, Box held, uint8_t* out,
                  ptrdiff_t out_stride);

}  // namespace convneur

extern "C" {

// Makes a window of a resized image, as `make_resized` does, of the whole image. filter: 0 bilinear, 1 bicubic,
// 2 area. `out` takes window_height x window_width x 3 bytes. Returns 0, 1 where it isn't
// done, or 2 where there was too little memory.
int convneur_resize(const uint8_t* pixels, ptrdiff_t stride, int height, int width, int filter, int out_height,
                    int out_width, int top, int left, int window_height, int window_width, int hflip, int vflip,
                    uint8_t* out);

// Writes which part of the image that takes: top, left, height, width. Zeros where it isn't sound.
void convneur_resize_support(int height, int width, int filter, int out_height, int out_width, int top, int left,
                             int window_height, int window_width, int* box);

// As convneur_resize, of a buffer that holds only the part `held`: top, left, height, width.
int convneur_resize_part(const uint8_t* pixels, ptrdiff_t stride, const int* held, int height, int width, int filter,
                         int out_height, int out_width, int top, int left, int window_height, int window_width,
                         int hflip, int vflip, uint8_t* out);
}
