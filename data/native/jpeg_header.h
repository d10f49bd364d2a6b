// What a baseline JPEG says of itself before its pixels. Whatever libjpeg-turbo would warn of isn't taken, nor is what
// photographs hardly ever have.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace convneur::jpeg {

constexpr int64_t MOST_PIXELS = 178956970;  // as Pillow's MAX_IMAGE_PIXELS
constexpr int LONGEST_SIDE = 65500;         // as libjpeg's

struct Component {
    uint8_t id, quantiser, dc, ac;  // which tables
    int across, down;               // blocks in an MCU (minimum coded unit)
};

// Points into the file; what it hasn't given is null or 0.
struct Header {
    int width, height, components;  // 1 (grey) or 3 (YCbCr)
    Component component[3];
    const uint8_t* quantiser[4];    // 64 numbers, in zigzag order
    const uint8_t* code[8];         // 4 of DC, 4 of AC: how many codes have 1 to 16 bits, then their symbols
    int interval;                   // MCUs from one restart marker to the next
    int blocks, mcus_across, mcus_down;  // blocks in an MCU
    int profiles;                   // of colour
    const uint8_t *sos, *scan;      // the marker, and the entropy-coded data

    int mcus() const { return mcus_across * mcus_down; }
};

inline int symbols_of(const uint8_t* code) {
    int symbols = 0;
    for (int bits = 0; bits < 16; bits++)
        symbols += code[bits];
    return symbols;
}

inline bool take_frame(Header& header, const uint8_t* data, int length) {
    if (header.components || length < 9 || length != 6 + 3 * data[5] || data[0] != 8 || (data[5] != 1 && data[5] != 3))
        return false;
    const int sampling = data[7];
    if (sampling != 0x11 && sampling != 0x21 && sampling != 0x22)
        return false;
    header.height = data[1] << 8 | data[2];
    header.width = data[3] << 8 | data[4];
    header.components = data[5];
    const int across = data[5] == 1 ? 1 : sampling >> 4, down = data[5] == 1 ? 1 : sampling & 15;
    for (int c = 0; c < data[5]; c++) {
        const uint8_t* const given = data + 6 + 3 * c;
        if (given[0] != data[6] + c || given[2] > 3 || (c > 0 && given[1] != 0x11))
            return false;
        header.component[c] = {given[0], given[2], 0, 0, c == 0 ? across : 1, c == 0 ? down : 1};
    }
    header.blocks = across * down + data[5] - 1;
    header.mcus_across = (header.width + 8 * across - 1) / (8 * across);
    header.mcus_down = (header.height + 8 * down - 1) / (8 * down);
    const int narrowest = across == 1 ? 1 : 5;  // libjpeg treats fewer than three samples in a way of their own
    return header.height > 0 && header.width >= narrowest && header.height <= LONGEST_SIDE &&
           header.width <= LONGEST_SIDE && int64_t{header.height} * header.width <= MOST_PIXELS;
}

inline bool take_quantisers(Header& header, const uint8_t* data, int length) {  // of 8 bits
    for (; length >= 65 && data[0] < 4; data += 65, length -= 65)
        header.quantiser[data[0]] = data + 1;
    return length == 0;
}

inline bool take_codes(Header& header, const uint8_t* data, int length) {
    while (length >= 17) {
        const int size = 17 + symbols_of(data + 1);
        if (data[0] & ~0x13 || size > 17 + 256 || size > length)
            return false;
        header.code[data[0] >> 2 | (data[0] & 3)] = data + 1;
        data += size;
        length -= size;
    }
    return length == 0;
}

inline bool take_scan(Header& header, const uint8_t* data, int length) {
    const int components = header.components;
    if (!components || length != 4 + 2 * components || data[0] != components)
        return false;
    for (int c = 0; c < components; c++) {
        Component& component = header.component[c];
        const uint8_t* const given = data + 1 + 2 * c;
        component.dc = given[1] >> 4;
        component.ac = 4 + (given[1] & 15);
        if (given[0] != component.id || component.dc > 3 || component.ac > 7 || !header.code[component.dc] ||
            !header.code[component.ac] || !header.quantiser[component.quantiser])
            return false;
    }
    return std::memcmp(data + 1 + 2 * components, "\0\77\0", 3) == 0;  // all coefficients, all bits
}

// Takes a segment; false if it isn't one that is known.
inline bool take(Header& header, int marker, const uint8_t* data, int length) {
    const auto is = [&](const char* name, int size, int least) {
        return length >= least && std::memcmp(data, name, size) == 0;
    };
    switch (marker) {
    case 0xc0:
        return take_frame(header, data, length);
    case 0xc4:
        return take_codes(header, data, length);
    case 0xda:
        return take_scan(header, data, length);
    case 0xdb:
        return take_quantisers(header, data, length);
    case 0xdd:
        header.interval = length == 2 ? data[0] << 8 | data[1] : 0;
        return length == 2;
    case 0xe0:
        return !is("JFIF", 5, 14) || data[5] == 1;  // the version
    case 0xe2:  // a colour profile in one part
        return !is("ICC_PROFILE", 12, 14) ||
               (data[12] == 1 && data[13] == 1 && length > 14 && header.profiles++ == 0);
    case 0xee:
        return !is("Adobe", 5, 12) || data[11] == 1;  // YCbCr
    }
    return marker == 0xfe || (marker >= 0xe0 && marker <= 0xef);
}

// Reads the markers from SOI to SOS. False if the file isn't taken, or has fewer bits than two a block.
inline bool read_header(const uint8_t* bytes, size_t size, Header& header) {
    header = {};
    if (size < 2 || bytes[0] != 0xff || bytes[1] != 0xd8)
        return false;
    for (size_t at = 2; size - at >= 4 && bytes[at] == 0xff;) {
        const size_t length = bytes[at + 2] << 8 | bytes[at + 3];
        if (length < 2 || length > size - at - 2 ||
            !take(header, bytes[at + 1], bytes + at + 4, static_cast<int>(length) - 2))
            return false;
        header.sos = bytes + at;
        at += 2 + length;
        header.scan = bytes + at;
        if (header.sos[1] == 0xda)
            return int64_t{header.mcus()} * header.blocks / 4 <= static_cast<int64_t>(size - at);
    }
    return false;
}

}  // namespace convneur::jpeg
