// What a baseline JPEG says of itself before its pixels. Whatever libjpeg-turbo would warn of isn't taken.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace convneur::jpeg {

constexpr int64_t MOST_PIXELS = 178956970;  // as Pillow's MAX_IMAGE_PIXELS
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
    uint8_t id, across, down;  // blocks in an MCU
    uint8_t quantiser, dc, ac;  // which table
    int width, height;          // samples that belong to the image
};

struct Header {
    int width = 0, height = 0, components = 0;  // 1 (grey) or 3 (YCbCr)
    Component component[3] = {};
    bool quantised[4] = {};
    uint8_t quantiser[4][64] = {};  // in zigzag order
    HuffmanCode dc[4], ac[4];
    int interval = 0;                        // MCUs from one restart marker to the next; 0: there are none
    int mcu_width = 0, mcu_height = 0;       // pixels
    int mcus_across = 0, mcus_down = 0;
    size_t sos = 0, scan = 0;                // offsets of SOS and of the entropy-coded data

    int mcus() const { return mcus_across * mcus_down; }
};

// Reads the markers from SOI to SOS; false if the file isn't taken.
class HeaderReader {
  public:
    HeaderReader(const uint8_t* bytes, size_t size, Header& header) : bytes_(bytes), size_(size), header_(header) {}

    bool read() {
        if (size_ < 2 || bytes_[0] != 0xff || bytes_[1] != 0xd8)
            return false;
        for (size_t at = 2;;) {
            const size_t marker = at;
            if (at >= size_ || bytes_[at] != 0xff)
                return false;
            while (at < size_ && bytes_[at] == 0xff)  // fill bytes
                at++;
            if (size_ < 3 || at > size_ - 3)
                return false;
            const int code = bytes_[at];
            const int length = word(at + 1) - 2;
            if (length < 0 || static_cast<size_t>(length) > size_ - at - 3 ||
                !segment(code, bytes_ + at + 3, length))
                return false;
            at += 3 + length;
            if (code == 0xda) {
                header_.sos = marker;
                header_.scan = at;
                return profile_is_whole();
            }
        }
    }

  private:
    int word(size_t at) const { return bytes_[at] << 8 | bytes_[at + 1]; }

    bool segment(int code, const uint8_t* data, int length) {
        switch (code) {
        case 0xc0:
        case 0xc1:
            return frame(data, length);
        case 0xc4:
            return huffman_codes(data, length);
        case 0xda:
            return scan(data, length);
        case 0xdb:
            return quantisers(data, length);
        case 0xdd:
            header_.interval = length == 2 ? data[0] << 8 | data[1] : 0;
            return length == 2;
        case 0xe0:
            if (length >= 14 && std::memcmp(data, "JFIF", 5) == 0) {
                jfif_ = true;
                return data[5] == 1;  // libjpeg warns of other versions
            }
            return true;
        case 0xe2:
            return length < 14 || std::memcmp(data, "ICC_PROFILE", 12) != 0 || part_of_profile(data, length);
        case 0xee:
            if (length >= 12 && std::memcmp(data, "Adobe", 5) == 0) {
                adobe_ = true;
                transform_ = data[11];
            }
            return true;
        default:
            return code == 0xfe || (code >= 0xe0 && code <= 0xef);
        }
    }

    bool frame(const uint8_t* data, int length) {
        if (header_.components || length < 6 || data[0] != 8 || (data[5] != 1 && data[5] != 3) ||
            length != 6 + 3 * data[5])
            return false;
        header_.height = data[1] << 8 | data[2];
        header_.width = data[3] << 8 | data[4];
        header_.components = data[5];
        if (header_.height < 1 || header_.width < 1 || header_.height > 65500 || header_.width > 65500 ||
            static_cast<int64_t>(header_.height) * header_.width > MOST_PIXELS)
            return false;
        for (int c = 0; c < header_.components; c++) {
            const uint8_t* given = data + 6 + 3 * c;
            Component& component = header_.component[c];
            component.id = given[0];
            component.across = given[1] >> 4;
            component.down = given[1] & 15;
            component.quantiser = given[2];
            for (int other = 0; other < c; other++)
                if (header_.component[other].id == component.id)
                    return false;
            const int most = header_.components == 1 ? 4 : c == 0 ? 2 : 1;
            if (component.across < 1 || component.across > most || component.down < 1 || component.down > most ||
                component.quantiser > 3)
                return false;
        }
        if (header_.components == 1)  // its sampling factors mean nothing
            header_.component[0].across = header_.component[0].down = 1;
        const Component& luma = header_.component[0];
        header_.mcu_width = 8 * luma.across;
        header_.mcu_height = 8 * luma.down;
        header_.mcus_across = (header_.width + header_.mcu_width - 1) / header_.mcu_width;
        header_.mcus_down = (header_.height + header_.mcu_height - 1) / header_.mcu_height;
        for (int c = 0; c < header_.components; c++) {
            Component& component = header_.component[c];
            component.width = (header_.width * component.across + luma.across - 1) / luma.across;
            component.height = (header_.height * component.down + luma.down - 1) / luma.down;
        }
        return true;
    }

    bool scan(const uint8_t* data, int length) {
        const int components = header_.components;
        if (!components || length != 4 + 2 * components || data[0] != components || !is_ycbcr())
            return false;
        for (int c = 0; c < components; c++) {
            Component& component = header_.component[c];
            component.dc = data[2 + 2 * c] >> 4;
            component.ac = data[2 + 2 * c] & 15;
            if (data[1 + 2 * c] != component.id || component.dc > 3 || component.ac > 3 ||
                !header_.dc[component.dc].given || !header_.ac[component.ac].given ||
                !header_.quantised[component.quantiser])
                return false;
        }
        const uint8_t* spectrum = data + 1 + 2 * components;
        return spectrum[0] == 0 && spectrum[1] == 63 && spectrum[2] == 0;
    }

    // What libjpeg takes three components for: its default_decompress_parms.
    bool is_ycbcr() const {
        if (header_.components == 1 || jfif_)
            return true;
        if (adobe_)
            return transform_ == 1;
        return header_.component[0].id != 'R' || header_.component[1].id != 'G' || header_.component[2].id != 'B';
    }

    bool huffman_codes(const uint8_t* data, int length) {
        while (length >= 17) {
            const int which = data[0];
            int symbols = 0;
            for (int bits = 1; bits <= 16; bits++)
                symbols += data[bits];
            if (which & ~0x13 || symbols > 256 || length < 17 + symbols)
                return false;
            HuffmanCode& code = (which & 0x10 ? header_.ac : header_.dc)[which & 3];
            code = {};
            code.given = true;
            std::memcpy(code.counts + 1, data + 1, 16);
            std::memcpy(code.symbols, data + 17, symbols);
            data += 17 + symbols;
            length -= 17 + symbols;
        }
        return length == 0;
    }

    bool quantisers(const uint8_t* data, int length) {
        for (; length >= 65; data += 65, length -= 65) {
            if (data[0] > 3)  // or of 16 bits
                return false;
            header_.quantised[data[0]] = true;
            std::memcpy(header_.quantiser[data[0]], data + 1, 64);
        }
        return length == 0;
    }

    bool part_of_profile(const uint8_t* data, int length) {
        const int part = data[12], parts = data[13];
        if ((parts_ && parts != parts_) || part < 1 || part > parts || seen_[part])
            return false;
        parts_ = parts;
        seen_[part] = true;
        profile_ += length - 14;
        return true;
    }

    // TurboJPEG reads colour profiles, and warns of those with parts that are missing or empty.
    bool profile_is_whole() const {
        for (int part = 1; part <= parts_; part++)
            if (!seen_[part])
                return false;
        return parts_ == 0 || profile_ > 0;
    }

    const uint8_t* bytes_;
    size_t size_;
    Header& header_;
    bool jfif_ = false, adobe_ = false, seen_[256] = {};
    int transform_ = 0, parts_ = 0;
    int64_t profile_ = 0;
};

// Also false where there are fewer bits than two a block.
inline bool read_header(const uint8_t* bytes, size_t size, Header& header) {
    header = {};
    if (!HeaderReader(bytes, size, header).read())
        return false;
    const Component& luma = header.component[0];
    const int blocks = header.components == 1 ? 1 : luma.across * luma.down + 2;
    return static_cast<int64_t>(header.mcus()) * blocks / 4 <= static_cast<int64_t>(size - header.scan);
}

}  // namespace convneur::jpeg
