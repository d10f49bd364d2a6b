// The entropy-coded data of a JPEG: its restart segments, and the blocks in them.

#pragma once

#include <algorithm>
#include <vector>

#include "jpeg_huffman.h"

namespace convneur::jpeg {

constexpr size_t SLACK = 4096;  // bytes past a segment that may be read: an MCU has 6 * 64 * 26 bits at most

// A rectangle of pixels, or of MCUs.
struct Box {
    int top, left, height, width;

    bool has(int x, int y) const { return x >= left && x - left < width && y >= top && y - top < height; }
};

// Memory for so many, which stays from image to image.
template <typename T>
T* room_of(std::vector<T>& memory, size_t count) {
    if (memory.size() < count)
        memory.resize(count);
    return memory.data();
}

// Copies a segment without its stuffing, and moves `copy` past it. Returns what follows the marker at its end; null
// where there is none.
inline const uint8_t* unstuff(const uint8_t* data, const uint8_t* end, uint8_t*& copy) {
    for (;;) {
        const auto* marker = static_cast<const uint8_t*>(std::memchr(data, 0xff, end - data));
        if (!marker || marker + 1 == end)
            return nullptr;
        const size_t length = marker + (marker[1] == 0) - data;
        std::memcpy(copy, data, length);
        copy += length;
        data = marker + 2;
        if (marker[1] != 0)
            return data;
    }
}

// Reads the MCUs from `first` until `stop` from a segment, which may hold no more if it is read to its end; false if
// anything is odd.
template <typename Sink>
bool read_segment(const Header& header, const Table* tables, Bits bits, const uint8_t* end, int first, int stop,
                  const Box& wanted, bool to_end, Sink& sink) {
    int16_t unwanted[ROOM];
    int firsts[3] = {};
    for (int mcu = first; mcu < stop; mcu++) {
        const int column = mcu % header.mcus_across, row = mcu / header.mcus_across;
        const bool is_wanted = wanted.has(column, row);
        int odd = 0;
        for (int c = 0; c < header.components; c++) {
            const Component& component = header.component[c];
            for (int i = 0; i < component.across * component.down; i++) {
                int16_t* const room = is_wanted ? sink.room() : unwanted;
                const int k = bits.read(tables[component.dc], tables[component.ac], firsts[c], room);
                odd |= (k & WRONG) | ((firsts[c] + 2048) & ~4095);
                if (is_wanted)
                    sink.take(c, column * component.across + i % component.across,
                              row * component.down + i / component.across);
            }
        }
        if (odd || bits.left(end) < 0)
            return false;
    }
    return !to_end || bits.left(end) < 8;
}

// Reads an image's blocks; false if the file isn't taken. Those of wanted MCUs go to a sink, in the order of the scan.
// It has room(), ROOM zeros for a block's coefficients, of which the k-th goes to PLACES.of[k]; and take(component, x,
// y), which takes them. Unless `all` is to be sound, no more is read than what is wanted needs.
template <typename Sink>
bool read_blocks(const Header& header, const uint8_t* end, const Box& wanted, bool all, Sink& sink) {
    static thread_local std::vector<Table> tables(8);
    static thread_local std::vector<uint8_t> memory;
    for (int c = 0; c < header.components; c++)
        for (const int table : {header.component[c].dc, header.component[c].ac})
            if (!tables[table].set(header.code[table], table < 4))
                return false;
    const uint8_t* data = header.scan;
    uint8_t* const copy = room_of(memory, end - data + SLACK);
    const int mcus = header.mcus(), interval = header.interval ? header.interval : mcus;
    for (int first = 0, stop = 0; stop < mcus; first = stop) {
        if (!all && first / header.mcus_across >= wanted.top + wanted.height)
            return true;
        stop = std::min(mcus - first, interval) + first;
        uint8_t* copied = copy;
        data = unstuff(data, end, copied);
        if (!data || data[-1] != (stop == mcus ? 0xd9 : 0xd0 + first / interval % 8))
            return false;
        int last = stop;
        while (!all && last > first && !wanted.has((last - 1) % header.mcus_across, (last - 1) / header.mcus_across))
            last--;
        if (!read_segment(header, tables.data(), Bits{0, 0, copy}, copied, first, last, wanted, all, sink))
            return false;
    }
    return true;
}

}  // namespace convneur::jpeg
