// From an image to the square that the model sees, in one call: decoded as far as needed, resized, flipped, changed.
#include <algorithm>
#include <vector>

#include "jpeg.h"
#include "operations.h"
#include "resize.h"

namespace {

// A view as Python hands it over: `View` of data/views/view.py, the filter, and the side of the square.
struct View {
    int top, left, height, width;        // the rectangle of the image
    int resized_height, resized_width;   // that it gets
    int window_top, window_left;         // of the square within that
    int hflip, vflip, filter, size;
};

convneur::Resize resize_of(const View& view) {
    return {view.height,
            view.width,
            static_cast<convneur::Filter>(view.filter),
            view.resized_height,
            view.resized_width,
            {view.window_top, view.window_left, view.size, view.size},
            view.hflip != 0,
            view.vflip != 0};
}

bool are_known(const convneur::Operation* operations, int count) {
    return std::all_of(operations, operations + count, convneur::is_known);
}

void change(uint8_t* out, int size, const convneur::Operation* operations, int count) {
    for (int i = 0; i < count; i++) convneur::operate({out, size, size}, operations[i]);
}

}  // namespace

extern "C" {

// Shows a JPEG in `out`, size x size x 3 bytes, changed by `count` operations. Returns 0, or 1 where it isn't taken, see
// `convneur::jpeg::decode`, or an operation isn't known.
int convneur_show_jpeg(const uint8_t* bytes, size_t size, int proven, const View* view,
                       const convneur::Operation* operations, int count, uint8_t* out) try {
    static thread_local std::vector<uint8_t> pixels;
    const convneur::Resize resize = resize_of(*view);
    if (!convneur::is_sound(resize) || !are_known(operations, count)) return 1;
    const convneur::Box needed = convneur::support(resize);
    const ptrdiff_t stride = 3 * static_cast<ptrdiff_t>(needed.width);
    const size_t room = static_cast<size_t>(stride) * needed.height;
    if (pixels.size() < room) pixels.resize(room);
    const convneur::jpeg::Box box{view->top + needed.top, view->left + needed.left, needed.height, needed.width};
    if (!convneur::jpeg::decode(bytes, size, proven != 0, box, pixels.data(), stride)) return 1;
    if (!convneur::make_resized(resize, pixels.data(), stride, needed, out, 3 * static_cast<ptrdiff_t>(view->size)))
        return 1;
    change(out, view->size, operations, count);
    return 0;
} catch (...) {
    return 1;  // no memory
}

// Shows an image that is decoded already; `pixels` is the first one of the view's rectangle, rows `stride` bytes apart.
int convneur_show_pixels(const uint8_t* pixels, ptrdiff_t stride, const View* view,
                         const convneur::Operation* operations, int count, uint8_t* out) try {
    const convneur::Box whole{0, 0, view->height, view->width};
    if (!are_known(operations, count) ||
        !convneur::make_resized(resize_of(*view), pixels, stride, whole, out, 3 * static_cast<ptrdiff_t>(view->size)))
        return 1;
    change(out, view->size, operations, count);
    return 0;
} catch (...) {
    return 1;  // no memory
}
}
