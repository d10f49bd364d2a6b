#include "jpeg.h"

#include <new>

#include "jpeg_colour.h"
#include "jpeg_idct.h"

namespace convneur::jpeg {
namespace {

// A component's samples in a window of the image.
struct Plane {
    Row quantiser[8];
    uint8_t* samples;  // of the window
    int left, top, stride;
    int across, down;  // pixels that a sample stands for

    uint8_t* at(int x, int y) const { return samples + static_cast<ptrdiff_t>(y - top) * stride + x - left; }
};

// Makes samples of blocks, two at a time.
struct Samples {
    const Plane* planes;
    int count = 0;
    Target targets[2] = {};
    alignas(Row) int16_t blocks[ROOM] = {};  // beside each other

    int16_t* room() { return blocks + 8 * count; }
    void take(int component, int x, int y) {
        const Plane& plane = planes[component];
        targets[count++] = {plane.quantiser, plane.at(8 * x, 8 * y), plane.stride};
        if (count == 2)
            finish();
    }
    __attribute__((noinline)) void finish() {  // what reads blocks keeps its registers
        uint8_t spare[64];
        if (count == 1)
            targets[1] = {targets[0].quantiser, spare, 8};
        if (count > 0)
            idct(blocks, targets[0], targets[1]);
        std::memset(blocks, 0, sizeof blocks);
        count = 0;
    }
};

// The MCUs that a rectangle needs, with the samples around it that fancy upsampling asks for.
Box window_of(const Header& header, const Box& box) {
    const auto range = [](int first, int count, int size, int blocks, int& start, int& length) {
        const int margin = 2 * (blocks - 1), last = std::min(first + count - 1 + margin, size - 1);
        start = std::max(first - margin, 0) / (8 * blocks);
        length = last / (8 * blocks) + 1 - start;
    };
    Box window;
    range(box.left, box.width, header.width, header.component[0].across, window.left, window.width);
    range(box.top, box.height, header.height, header.component[0].down, window.top, window.height);
    return window;
}

}  // namespace

bool decode(const uint8_t* bytes, size_t size, bool proven, const Box& box, uint8_t* out, ptrdiff_t stride) {
    static thread_local std::vector<uint8_t> samples, rows;
    static thread_local std::vector<uint16_t> sums;
    Header header;
    if (!read_header(bytes, size, header) || box.top < 0 || box.left < 0 || box.height < 1 || box.width < 1 ||
        box.height > header.height - box.top || box.width > header.width - box.left)
        return false;
    const Box window = window_of(header, box);
    Plane planes[3];
    uint8_t* at = room_of(samples, size_t{64} * header.blocks * window.width * window.height + WIDE);
    for (int c = 0; c < header.components; c++) {
        const Component& component = header.component[c];
        Plane& plane = planes[c];
        for (int k = 0; k < 64; k++)
            for (const int x : {0, 8})
                plane.quantiser[NATURAL[k] / 8][NATURAL[k] % 8 + x] = header.quantiser[component.quantiser][k];
        plane.samples = at;
        plane.left = 8 * component.across * window.left;
        plane.top = 8 * component.down * window.top;
        plane.stride = 8 * component.across * window.width;
        plane.across = header.component[0].across / component.across;
        plane.down = header.component[0].down / component.down;
        at += size_t{8} * component.down * window.height * plane.stride;
    }
    Samples sink{planes};
    if (!read_blocks(header, bytes + size, window, !proven, sink))
        return false;
    sink.finish();

    const int width = planes[0].stride, offset = box.left - planes[0].left;
    uint8_t* const chroma[2] = {room_of(rows, 2 * (width + WIDE)), rows.data() + width + WIDE};
    uint8_t rest[3 * WIDE];
    room_of(sums, width + 2);
    if (header.components == 1)
        std::memset(chroma[0], 128, 2 * (width + WIDE));
    for (int y = box.top; y < box.top + box.height; y++, out += stride) {
        const uint8_t* row[3] = {planes[0].at(planes[0].left, y), chroma[0], chroma[1]};
        for (int c = 1; c < header.components; c++) {
            const Plane& plane = planes[c];
            const int last = (header.height - 1) / plane.down, near = y / plane.down;
            const int far = plane.down == 1 ? near : std::clamp(near + (y % 2 ? 1 : -1), 0, last);
            row[c] = plane.at(plane.left, near);
            if (plane.across == 2) {
                const int count = std::min(plane.stride, (header.width + 1) / 2 - plane.left);
                doubled(row[c], plane.at(plane.left, far), count, plane.down == 2, sums.data(), chroma[c - 1]);
                row[c] = chroma[c - 1];
            }
        }
        for (int x = 0; x < box.width; x += WIDE)
            colour(row[0] + offset + x, row[1] + offset + x, row[2] + offset + x,
                   x + WIDE <= box.width ? out + 3 * x : rest);
        std::memcpy(out + 3 * (box.width - box.width % WIDE), rest, 3 * (box.width % WIDE));
    }
    return true;
}

}  // namespace convneur::jpeg

extern "C" int convneur_jpeg_decode(const uint8_t* bytes, size_t size, int proven, int top, int left, int height,
                                    int width, uint8_t* out, ptrdiff_t stride) try {
    return convneur::jpeg::decode(bytes, size, proven, {top, left, height, width}, out, stride) ? 0 : 1;
} catch (const std::bad_alloc&) {
    return 1;
}
