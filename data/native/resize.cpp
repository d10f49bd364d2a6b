#include "resize.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "area.h"
#include "passes.h"

namespace convneur {
namespace {

// Outputs are named from the other end where the image is flipped.
void reverse(AxisWeights& axis) {
    std::reverse(axis.starts.begin(), axis.starts.end());
    std::reverse(axis.counts.begin(), axis.counts.end());
    for (size_t i = 0, j = axis.starts.size() - 1; i < j; i++, j--)
        std::swap_ranges(&axis.weights[i * axis.taps], &axis.weights[i * axis.taps] + axis.taps,
                         &axis.weights[j * axis.taps]);
}

void copy_row(const uint8_t* from, int width, bool flip, uint8_t* to) {
    if (!flip) {
        std::memcpy(to, from, 3 * static_cast<size_t>(width));
        return;
    }
    for (int x = 0; x < width; x++) std::memcpy(to + 3 * (width - 1 - x), from + 3 * x, 3);
}

// An image made on the way, with kMargin bytes behind it.
uint8_t* scratch(int rows, ptrdiff_t stride) {
    static thread_local std::vector<uint8_t> buffer;
    const size_t bytes = static_cast<size_t>(rows) * stride + kMargin;
    if (buffer.size() < bytes) buffer.resize(bytes);
    return buffer.data();
}

// Along the rows that the window's columns need, then down the columns.
void rows_first(const Resize& r, const AxisWeights& across, const AxisWeights& down, Box needed, const uint8_t* pixels,
                ptrdiff_t stride, uint8_t* out, ptrdiff_t out_stride) {
    const ptrdiff_t row = 3 * static_cast<ptrdiff_t>(r.window.width);
    uint8_t* between = scratch(needed.height, row);
    resize_rows(pixels, stride, needed.height, needed.width, across, between, row);
    for (int y = 0; y < r.window.height; y++)
        resize_column(between, row, static_cast<int>(row), down, y, out + y * out_stride);
}

// Down the columns that the window's rows need, then along the rows.
void columns_first(const Resize& r, const AxisWeights& across, const AxisWeights& down, Box needed,
                   const uint8_t* pixels, ptrdiff_t stride, uint8_t* out, ptrdiff_t out_stride) {
    const ptrdiff_t before = 3 * static_cast<ptrdiff_t>(needed.width), after = 3 * static_cast<ptrdiff_t>(r.window.width);
    uint8_t* between = scratch(r.window.height, before + after);
    for (int y = 0; y < r.window.height; y++)
        resize_column(pixels, stride, static_cast<int>(before), down, y, between + y * before);
    uint8_t* made = between + r.window.height * before;
    resize_rows(between, before, r.window.height, needed.width, across, made, after);
    for (int y = 0; y < r.window.height; y++) std::memcpy(out + y * out_stride, made + y * after, after);
}

void make_filtered(const Resize& r, Box needed, const uint8_t* pixels, ptrdiff_t stride, uint8_t* out,
                   ptrdiff_t out_stride) {
    static thread_local AxisWeights across, down;
    const bool is_across = r.width != r.out_width, is_down = r.height != r.out_height;
    if (is_across) {
        make_weights(r.width, r.out_width, r.filter, r.window.left, r.window.width, across);
        for (int& start : across.starts) start -= needed.left;
        if (r.hflip) reverse(across);
    }
    if (is_down) {
        make_weights(r.height, r.out_height, r.filter, r.window.top, r.window.height, down);
        for (int& start : down.starts) start -= needed.top;
        if (r.vflip) reverse(down);
    }
    if (is_across && is_down) {
        // Pillow 13's choice.
        const bool columns = r.height - r.out_height > 2 * (r.width - r.out_width) && r.height > r.out_height;
        (columns ? columns_first : rows_first)(r, across, down, needed, pixels, stride, out, out_stride);
        return;
    }
    uint8_t* row = scratch(r.window.height, 3 * static_cast<ptrdiff_t>(r.window.width));
    for (int y = 0; y < r.window.height; y++) {
        uint8_t* to = out + y * out_stride;
        const uint8_t* from = pixels + (r.vflip ? r.window.height - 1 - y : y) * stride;
        if (is_down) {
            resize_column(pixels, stride, 3 * r.window.width, down, y, r.hflip ? row : to);
            if (r.hflip) copy_row(row, r.window.width, true, to);
        } else if (!is_across) {
            copy_row(from, r.window.width, r.hflip, to);
        }
    }
    if (is_across) {
        const ptrdiff_t bytes = 3 * static_cast<ptrdiff_t>(r.window.width);
        resize_rows(pixels, stride, r.window.height, needed.width, across, row, bytes);
        for (int y = 0; y < r.window.height; y++)
            std::memcpy(out + (r.vflip ? r.window.height - 1 - y : y) * out_stride, row + y * bytes, bytes);
    }
}

bool holds(Box held, Box needed) {
    return held.top <= needed.top && held.left <= needed.left &&
           held.top + held.height >= needed.top + needed.height && held.left + held.width >= needed.left + needed.width;
}

// The inputs of a window's outputs along an axis; where the side stays as it is, no pass is made.
void side(int size, int out_size, Filter filter, int first, int count, int& begin, int& length) {
    int end = first + count;
    begin = first;
    if (size != out_size) support_of(size, out_size, filter, first, count, begin, end);
    length = end - begin;
}

}  // namespace

bool is_sound(const Resize& r) {
    for (const int length : {r.height, r.width, r.out_height, r.out_width, r.window.height, r.window.width})
        if (length < 1 || length > kLongest) return false;
    return r.filter >= kBilinear && r.filter <= kArea && r.window.top >= 0 && r.window.left >= 0 &&
           r.window.top <= r.out_height - r.window.height && r.window.left <= r.out_width - r.window.width;
}

Box support(const Resize& r) {
    if (r.filter == kArea) return area_support(r);
    Box box{};
    side(r.height, r.out_height, r.filter, r.window.top, r.window.height, box.top, box.height);
    side(r.width, r.out_width, r.filter, r.window.left, r.window.width, box.left, box.width);
    return box;
}

bool make_resized(const Resize& resize, const uint8_t* pixels, ptrdiff_t stride, Box held, uint8_t* out,
                  ptrdiff_t out_stride) {
    if (!is_sound(resize)) return false;
    const Box needed = support(resize);
    if (!holds(held, needed) || stride < 3 * static_cast<ptrdiff_t>(held.width)) return false;
    pixels += (needed.top - held.top) * stride + 3 * static_cast<ptrdiff_t>(needed.left - held.left);
    (resize.filter == kArea ? make_area : make_filtered)(resize, needed, pixels, stride, out, out_stride);
    return true;
}

}  // namespace convneur

using convneur::Box;
using convneur::Resize;

extern "C" {

int convneur_resize(const uint8_t* pixels, ptrdiff_t stride, int height, int width, int filter, int out_height,
                    int out_width, int top, int left, int window_height, int window_width, int hflip, int vflip,
                    uint8_t* out) {
    const int held[4] = {0, 0, height, width};
    return convneur_resize_part(pixels, stride, held, height, width, filter, out_height, out_width, top, left,
                                window_height, window_width, hflip, vflip, out);
}

void convneur_resize_support(int height, int width, int filter, int out_height, int out_width, int top, int left,
                             int window_height, int window_width, int* box) {
    const Resize resize{height, width, static_cast<convneur::Filter>(filter), out_height, out_width,
                        {top, left, window_height, window_width}};
    const Box made = convneur::is_sound(resize) ? convneur::support(resize) : Box{};
    const int values[4] = {made.top, made.left, made.height, made.width};
    std::copy_n(values, 4, box);
}

int convneur_resize_part(const uint8_t* pixels, ptrdiff_t stride, const int* held, int height, int width, int filter,
                         int out_height, int out_width, int top, int left, int window_height, int window_width,
                         int hflip, int vflip, uint8_t* out) try {
    const Resize resize{height,     width,     static_cast<convneur::Filter>(filter),
                        out_height, out_width, {top, left, window_height, window_width},
                        hflip != 0, vflip != 0};
    const Box part{held[0], held[1], held[2], held[3]};
    return !convneur::make_resized(resize, pixels, stride, part, out, 3 * static_cast<ptrdiff_t>(window_width));
} catch (...) {
    return 2;
}
}
