// What a baseline JPEG says of itself before its pixels. Whatever libjpeg-turbo would warn of isn't taken.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace convneur::jpeg {

constexpr int64_t MOST_PIXELS = 178956970;  // as Pillow's MAX_IMAGE_PIXELS
constexpr int LONGEST_SIDE = 65500;         // as libjpeg's
constexpr int MOST_BLOCKS = 6;              // in an MCU (minimum coded unit)

// Where the zigzag's k-th coefficient lies in a block, row by row.
constexpr uint8_t NATURAL[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
                                 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
                                 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

struct HuffmanCode {
    bool given = false;
    uint8_t counts[17] = {};  // codes of 1 to 16 bits
    uint8_t symbols[256] = {};
};

struct Component {
    uint8_t id, across, down;   // blocks in an MCU
    uint8_t quantiser, dc, ac;  // which table
    int width, height;          // samples that belong to the image
};

struct Header {
    int width, height, components;  // 1 (grey) or 3 (YCbCr)
    Component component[3];
    bool quantised[4];
    uint8_t quantiser[4][64];   // in zigzag order
    HuffmanCode dc[4], ac[4];
    int interval;               // MCUs from one restart marker to the next; 0: there are none
    int mcu_width, mcu_height;  // pixels
    int mcus_across, mcus_down;
    size_t sos, scan;           // offsets of SOS and of the entropy-coded data

    int mcus() const { return mcus_across * mcus_down; }
};

// Reads the markers from SOI to SOS.
class HeaderReader {
  public:
    explicit HeaderReader(Header& header) : header_(header) {}

    bool read(const uint8_t* bytes, size_t size) {
        if (size < 2 || bytes[0] != 0xff || bytes[1] != 0xd8)
            return false;
        for (size_t at = 2; at < size && bytes[at] == 0xff;) {
            header_.sos = at;
            while (at < size && bytes[at] == 0xff)  // fill bytes
                at++;
            const size_t length = size - at < 3 ? 0 : bytes[at + 1] << 8 | bytes[at + 2];
            if (length < 2 || length > size - at - 1 || !take(bytes[at], bytes + at + 3, static_cast<int>(length) - 2))
                return false;
            header_.scan = at + 1 + length;
            if (bytes[at] == 0xda)
                return true;
            at = header_.scan;
        }
        return false;
    }

  private:
    bool take(int marker, const uint8_t* data, int length) {
        switch (marker) {
        case 0xc0:
        case 0xc1:
            return take_frame(data, length);
        case 0xc4:
            return take_codes(data, length);
        case 0xda:
            return take_scan(data, length);
        case 0xdb:
            for (; length >= 65 && data[0] < 4; data += 65, length -= 65) {  // of 8 bits
                header_.quantised[data[0]] = true;
                std::memcpy(header_.quantiser[data[0]], data + 1, 64);
            }
            return length == 0;
        case 0xdd:
            header_.interval = length == 2 ? data[0] << 8 | data[1] : 0;
            return length == 2;
        case 0xe2:
            return length < 14 || std::memcmp(data, "ICC_PROFILE", 12) != 0 || take_profile(data, length);
        }
        const bool jfif = marker == 0xe0 && length >= 14 && std::memcmp(data, "JFIF", 5) == 0;
        jfif_ |= jfif;
        if (marker == 0xee && length >= 12 && std::memcmp(data, "Adobe", 5) == 0)
            adobe_ = data[11];
        return (marker == 0xfe || (marker >= 0xe0 && marker <= 0xef)) && (!jfif || data[5] == 1);
    }

    bool take_frame(const uint8_t* data, int length) {
        if (header_.components || length < 6 || length != 6 + 3 * data[5] || data[0] != 8 ||
            (data[5] != 1 && data[5] != 3))
            return false;
        header_.height = data[1] << 8 | data[2];
        header_.width = data[3] << 8 | data[4];
        header_.components = data[5];
        for (int c = 0; c < data[5]; c++) {
            const uint8_t* const given = data + 6 + 3 * c;
            uint8_t across = given[1] >> 4, down = given[1] & 15;
            const int most = data[5] == 1 ? 4 : c == 0 ? 2 : 1;
            if (across < 1 || across > most || down < 1 || down > most || given[2] > 3)
                return false;
            if (data[5] == 1)  // those of a grey image mean nothing
                across = down = 1;
            header_.component[c] = {given[0], across, down, given[2], 0, 0, 0, 0};
        }
        const int across = header_.component[0].across, down = header_.component[0].down;
        header_.mcu_width = 8 * across;
        header_.mcu_height = 8 * down;
        header_.mcus_across = (header_.width + 8 * across - 1) / (8 * across);
        header_.mcus_down = (header_.height + 8 * down - 1) / (8 * down);
        for (Component& component : header_.component) {
            component.width = (header_.width * component.across + across - 1) / across;
            component.height = (header_.height * component.down + down - 1) / down;
        }
        return header_.height > 0 && header_.width > 0 && header_.height <= LONGEST_SIDE &&
               header_.width <= LONGEST_SIDE && int64_t{header_.height} * header_.width <= MOST_PIXELS;
    }

    bool take_codes(const uint8_t* data, int length) {
        while (length >= 17) {
            int symbols = 0;
            for (int bits = 1; bits <= 16; bits++)
                symbols += data[bits];
            if (data[0] & ~0x13 || symbols > 256 || length < 17 + symbols)
                return false;
            HuffmanCode& code = (data[0] & 0x10 ? header_.ac : header_.dc)[data[0] & 3];
            code = {};
            code.given = true;
            std::memcpy(code.counts + 1, data + 1, 16);
            std::memcpy(code.symbols, data + 17, symbols);
            data += 17 + symbols;
            length -= 17 + symbols;
        }
        return length == 0;
    }

    // TurboJPEG warns of colour profiles whose parts don't fit together.
    bool take_profile(const uint8_t* data, int length) {
        const int part = data[12], parts = data[13];
        const bool fits = part > 0 && part <= parts && !part_seen_[part] && (!parts_ || parts_ == parts);
        part_seen_[part] = true;
        parts_ = parts;
        parts_left_ = (parts_left_ ? parts_left_ : parts) - 1;
        profile_ += length - 14;
        return fits;
    }

    bool take_scan(const uint8_t* data, int length) {
        const int components = header_.components;
        if (!components || length != 4 + 2 * components || data[0] != components)
            return false;
        Component* const component = header_.component;
        for (int c = 0; c < components; c++) {
            component[c].dc = data[2 + 2 * c] >> 4;
            component[c].ac = data[2 + 2 * c] & 15;
            if (data[1 + 2 * c] != component[c].id || component[c].dc > 3 || component[c].ac > 3 ||
                !header_.dc[component[c].dc].given || !header_.ac[component[c].ac].given ||
                !header_.quantised[component[c].quantiser])
                return false;
        }
        const uint8_t* const spectrum = data + 1 + 2 * components;
        const bool profile_fits = parts_left_ == 0 && (parts_ == 0 || profile_ > 0);
        return spectrum[0] == 0 && spectrum[1] == 63 && spectrum[2] == 0 && profile_fits &&
               (components == 1 || is_ycbcr(component[0].id, component[1].id, component[2].id));
    }

    // What libjpeg takes three components for: its default_decompress_parms.
    bool is_ycbcr(int first, int second, int third) const {
        const bool rgb = !jfif_ && (adobe_ < 0 ? first == 'R' && second == 'G' && third == 'B' : adobe_ != 1);
        return !rgb && first != second && first != third && second != third;
    }

    Header& header_;
    bool jfif_ = false, part_seen_[256] = {};
    int adobe_ = -1;  // the last one's transform
    int parts_ = 0, parts_left_ = 0, profile_ = 0;  // of a colour profile; its bytes
};

// False if the file isn't taken, or has fewer bits than two a block.
inline bool read_header(const uint8_t* bytes, size_t size, Header& header) {
    header = {};
    if (!HeaderReader(header).read(bytes, size))
        return false;
    const Component& luma = header.component[0];
    const int64_t blocks = header.components == 1 ? 1 : luma.across * luma.down + 2;
    return header.mcus() * blocks / 4 <= static_cast<int64_t>(size - header.scan);
}

}  // namespace convneur::jpeg
