#include "jpeg.h"

#include <new>

#include "jpeg_scan.h"

namespace convneur::jpeg {
namespace {

struct Memory {
    Tables tables;
    Scratch<uint8_t> data;
    std::vector<Segment> segments;
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

struct Coefficients {
    const Header& header;
    std::vector<int16_t>* blocks;
    int16_t block[80] = {};

    bool wants(int, int, int) const { return true; }
    int16_t* room() { return block; }
    void take(int component, int x, int y, bool) {
        const size_t across = header.mcus_across * header.component[component].across;
        for (int k = 0; k < 64; k++)
            blocks[component][(y * across + x) * 64 + k] = block[NATURAL[k]];
        std::fill_n(block, 64, 0);
    }
};

}  // namespace

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
