#include "jpeg.h"

#include <new>

#include "jpeg_colour.h"
#include "jpeg_idct.h"
#include "jpeg_scan.h"

namespace convneur::jpeg {
namespace {

struct Memory {
    Tables tables;
    Scratch<uint8_t> data;
    std::vector<Segment> segments;
    Scratch<uint8_t> samples, chroma;
    Scratch<uint16_t> sums;
};
thread_local std::unique_ptr<Memory> memory;

// Reads the blocks of all MCUs that are needed into sinks; false if anything is odd.
template <typename Sink>
bool read_blocks(const uint8_t* bytes, size_t size, bool proven, const Header& header, const Needed& needed,
                 Sink& one, Sink& other) {
    uint8_t* const copy = memory->data.of(size - header.scan + SLACK);
    if (!memory->tables.set(header) || !find_segments(bytes + header.scan, bytes + size, header,
                                                      proven ? &needed : nullptr, copy, memory->segments))
        return false;
    Scan scan = {header, memory->tables, needed, memory->segments};
    Lane<Sink> a(scan, one), b(scan, other);
    Lane<Sink>::run(a, b);
    return !scan.failed;
}

// The blocks of a component that a rectangle needs, and their samples.
struct Plane {
    int left, top, right, bottom;  // blocks
    int across, down;              // pixels that a sample stands for
    int width, height;             // samples of the image
    Row quantiser[8];
    uint8_t* samples;
    ptrdiff_t stride;

    size_t size() const { return stride * 8 * (bottom - top); }
    uint8_t* at(int x, int y) const { return samples + (y - 8 * top) * stride + x - 8 * left; }
    bool has(int x, int y) const { return x >= left && x < right && y >= top && y < bottom; }  // a block

    void set(const Header& header, int c, const Box& box) {
        const Component& component = header.component[c];
        across = header.component[0].across / component.across;
        down = header.component[0].down / component.down;
        width = component.width;
        height = component.height;
        const int x = across - 1, y = down - 1;  // neighbours that fancy upsampling asks for
        left = std::max(box.left / across - x, 0) / 8;
        top = std::max(box.top / down - y, 0) / 8;
        right = std::min((box.left + box.width - 1) / across + x, width - 1) / 8 + 1;
        bottom = std::min((box.top + box.height - 1) / down + y, height - 1) / 8 + 1;
        stride = 8 * (right - left);
        for (int k = 0; k < 64; k++)
            quantiser[NATURAL[k] / 8][NATURAL[k] % 8] = quantiser[NATURAL[k] / 8][8 + NATURAL[k] % 8] =
                header.quantiser[component.quantiser][k];
    }

    // The samples of row y of the image from column `left` on, brought to its size.
    const uint8_t* row(int y, int first, int count, uint16_t* sums, uint8_t* out) const {
        const uint8_t* const near = at(0, y / down);
        if (across * down == 1)
            return near + first;
        const uint8_t* const far = at(0, std::clamp(y / down + (y % 2 ? 1 : -1), 0, height - 1));
        if (across == 1) {
            for (int i = 0; i < count; i++)
                out[i] = (3 * near[first + i] + far[first + i] + 1 + y % 2) >> 2;
            return out;
        }
        const int begin = first / 2, samples_count = (first + count - 1) / 2 + 1 - begin;
        if (width <= 2) {
            for (int i = 0; i < 2 * samples_count; i++)
                out[i] = near[begin + i / 2];
            return out + first % 2;
        }
        // sums[i] is of sample begin - 1 + i; past the image's edges, the nearest ones count.
        const int inner = std::max(begin - 1, 0), end = std::min(begin + samples_count + 1, width);
        add_up(near + inner, down == 2 ? far + inner : nullptr, end - inner, sums + inner - (begin - 1));
        if (inner > begin - 1)
            sums[0] = sums[1];
        if (end < begin + samples_count + 1)
            sums[samples_count + 1] = sums[samples_count];
        if (down == 2)
            doubled<true>(sums + 1, samples_count, out);
        else
            doubled<false>(sums + 1, samples_count, out);
        return out + first % 2;
    }
};

struct Pixels {
    const Header& header;
    const Plane* planes;
    int column = 0, row = 0, count = 0;
    bool inside = false;            // all blocks of the MCU are wanted
    uint8_t* samples[3] = {};       // of its first blocks
    Target targets[2] = {};
    alignas(Row) int16_t blocks[ROOM] = {};  // of two, beside each other

    void start(int new_column, int new_row) {
        column = new_column;
        row = new_row;
        inside = true;
        for (int c = 0; c < header.components; c++) {
            const Plane& plane = planes[c];
            const int across = header.component[c].across, down = header.component[c].down;
            const int x = column * across, y = row * down;
            inside &= x >= plane.left && x + across <= plane.right && y >= plane.top && y + down <= plane.bottom;
            samples[c] = plane.samples + 8 * ((y - plane.top) * plane.stride + x - plane.left);
        }
    }
    int16_t* room() { return blocks + 8 * count; }
    void take(const Block& block, bool flat) {
        const Plane& plane = planes[block.component];
        const Component& component = header.component[block.component];
        targets[count] = {plane.quantiser, samples[block.component] + 8 * (block.y * plane.stride + block.x),
                          plane.stride};
        if (!inside && !plane.has(column * component.across + block.x, row * component.down + block.y)) {
            for (int y = 0; y < 8; y++)
                std::memset(room() + PITCH * y, 0, 16);
        } else if (flat) {
            flat_idct(*room(), targets[count]);
            *room() = 0;
        } else if (++count == 2) {
            finish();
        }
    }
    void finish() {
        uint8_t spare[64];
        if (count == 1)
            targets[1] = {targets[0].quantiser, spare, 8};
        if (count > 0)
            idct(blocks, targets[0], targets[1]);
        std::memset(blocks, 0, sizeof blocks);
        count = 0;
    }
};

// Writes a row of RGB.
void colour_row(int width, const uint8_t* luma, const uint8_t* blue, const uint8_t* red, uint8_t* out) {
    if (width < WIDE) {
        uint8_t pixels[3 * WIDE];
        coloured(luma, blue, red, pixels);
        std::memcpy(out, pixels, 3 * width);
        return;
    }
    for (int x = 0; x < width; x += WIDE) {
        const int from = std::min(x, width - WIDE);
        coloured(luma + from, blue + from, red + from, out + 3 * from);
    }
}

struct Coefficients {
    const Header& header;
    std::vector<int16_t>* blocks;
    int column = 0, row = 0;
    int16_t block[ROOM] = {};

    void start(int new_column, int new_row) {
        column = new_column;
        row = new_row;
    }
    int16_t* room() { return block; }
    void take(const Block& from, bool) {
        const Component& component = header.component[from.component];
        const size_t y = row * component.down + from.y, x = column * component.across + from.x;
        int16_t* const out = &blocks[from.component][64 * (y * header.mcus_across * component.across + x)];
        for (int k = 0; k < 64; k++)
            out[k] = block[PLACES.of[k]];
        std::fill_n(block, ROOM, 0);
    }
};

}  // namespace

bool decode(const uint8_t* bytes, size_t size, bool proven, const Box& box, uint8_t* out, ptrdiff_t stride) {
    if (!memory)
        memory = std::make_unique<Memory>();
    Header header;
    if (!read_header(bytes, size, header) || box.top < 0 || box.left < 0 || box.height < 1 || box.width < 1 ||
        box.height > header.height - box.top || box.width > header.width - box.left)
        return false;
    Plane planes[3];
    Needed needed = {header.mcus_across, header.mcus_down, 0, 0, header.mcus_across};
    size_t samples = 0;
    for (int c = 0; c < header.components; c++) {
        Plane& plane = planes[c];
        const Component& component = header.component[c];
        plane.set(header, c, box);
        samples += plane.size();
        needed.left = std::min(needed.left, plane.left / component.across);
        needed.top = std::min(needed.top, plane.top / component.down);
        needed.right = std::max(needed.right, (plane.right - 1) / component.across + 1);
        needed.bottom = std::max(needed.bottom, (plane.bottom - 1) / component.down + 1);
    }
    uint8_t* at = memory->samples.of(samples + WIDE);
    for (int c = 0; c < header.components; c++) {
        planes[c].samples = at;
        at += planes[c].size();
    }
    Pixels one{header, planes}, other{header, planes};
    if (!read_blocks(bytes, size, proven, header, needed, one, other))
        return false;
    one.finish();
    other.finish();
    const size_t room = box.width + 4 + WIDE;
    uint8_t* const chroma = memory->chroma.of(2 * room);
    uint16_t* const sums = memory->sums.of(room);
    if (header.components == 1)
        std::memset(chroma, 128, room);
    for (int y = box.top; y < box.top + box.height; y++, out += stride) {
        const uint8_t *blue = chroma, *red = chroma;
        if (header.components == 3) {
            blue = planes[1].row(y, box.left, box.width, sums, chroma);
            red = planes[2].row(y, box.left, box.width, sums, chroma + room);
        }
        colour_row(box.width, planes[0].at(box.left, y), blue, red, out);
    }
    memory->samples.shrink();
    memory->data.shrink();
    return true;
}

bool read_coefficients(const uint8_t* bytes, size_t size, Header& header, std::vector<int16_t> (&blocks)[3]) {
    if (!memory)
        memory = std::make_unique<Memory>();
    if (!read_header(bytes, size, header))
        return false;
    for (int c = 0; c < header.components; c++)
        blocks[c].assign(size_t{64} * header.mcus() * header.component[c].across * header.component[c].down, 0);
    const Needed all = {0, 0, header.mcus_across, header.mcus_down, header.mcus_across};
    Coefficients one{header, blocks}, other{header, blocks};
    return read_blocks(bytes, size, false, header, all, one, other);
}

}  // namespace convneur::jpeg

extern "C" int convneur_jpeg_decode(const uint8_t* bytes, size_t size, int proven, int top, int left, int height,
                                    int width, uint8_t* out, ptrdiff_t stride) try {
    return convneur::jpeg::decode(bytes, size, proven, {top, left, height, width}, out, stride) ? 0 : 1;
} catch (const std::bad_alloc&) {
    return 1;
}
