// A baseline JPEG rewritten without loss: the same coefficients, with restart markers and the best Huffman codes for
// them. All segments but the codes and the interval stay as they are, and so does what follows the image.

#include <exception>
#include <numeric>
#include <string>

#include "jpeg_scan.h"

namespace {

using namespace convneur::jpeg;

constexpr int RESTART = 8;  // a token's code number where a marker is to be written

// MCUs from marker to marker, in a row of `across`, if so many `wanted` are of 6 blocks, as 4:2:0 has: a divisor of the
// row, so that markers form columns, unless all are far too small or too large.
int interval_of(int across, int blocks, int wanted) {
    const int most = (6 * wanted + blocks - 1) / blocks;
    if (across <= most)
        return across;
    int divisor = most;
    while (across % divisor)
        divisor--;
    if (2 * divisor >= most)
        return divisor;
    for (divisor = most + 1; divisor <= 2 * most; divisor++)
        if (across % divisor == 0)
            return divisor;
    const int parts = (2 * across + most) / (2 * most);  // nearest
    return (across + parts - 1) / parts;
}

// A symbol with the bits that follow it. code: 0 to 3 of DC, 4 to 7 of AC.
struct Token {
    uint8_t code, symbol;
    uint16_t bits;
};

// Takes blocks in the order of the scan.
class Tokens {
  public:
    Tokens(const Header& header, int interval) : header_(header), interval_(interval) {}

    int16_t* room() {
        std::memset(room_, 0, sizeof room_);
        return room_;
    }

    void take(int c, int, int) {
        if (blocks_ && blocks_ % (interval_ * header_.blocks) == 0) {
            std::fill_n(firsts_, 3, 0);
            tokens.push_back({RESTART, 0, 0});
        }
        blocks_++;
        const Component& component = header_.component[c];
        add(component.dc, 0, room_[0] - firsts_[c]);
        firsts_[c] = room_[0];
        int run = 0;
        for (int k = 1; k < 64; k++) {
            const int value = room_[PLACES.of[k]];
            if (value == 0) {
                run++;
                continue;
            }
            for (; run > 15; run -= 16)
                add(component.ac, 0xf0, 0);
            add(component.ac, run << 4, value);
            run = 0;
        }
        if (run)
            add(component.ac, 0, 0);
    }

    std::vector<Token> tokens;
    int64_t counts[8][256] = {};
    bool failed = false;  // a value is too large

  private:
    void add(int code, int symbol, int value) {
        const int size = value ? 32 - __builtin_clz(value < 0 ? -value : value) : 0;
        failed |= size > (code < 4 ? MOST_DC : MOST_AC);
        symbol |= size & 15;
        counts[code][symbol]++;
        const int bits = value < 0 ? value + (1 << size) - 1 : value;
        tokens.push_back({static_cast<uint8_t>(code), static_cast<uint8_t>(symbol), static_cast<uint16_t>(bits)});
    }

    const Header& header_;
    const int interval_;
    int64_t blocks_ = 0;
    int firsts_[3] = {};
    int16_t room_[ROOM];
};

// The best Huffman code, as Header's, of at most 16 bits for symbols that occur so often: annex K.2 of the standard. A
// 257th symbol, which isn't written, takes the code of all ones.
std::string best_code(const int64_t* counts) {
    int64_t weights[257];
    int sizes[257] = {}, tree[257], of_size[258] = {};
    std::copy_n(counts, 256, weights);
    weights[256] = 1;
    std::iota(tree, tree + 257, 0);
    for (;;) {
        int least = -1, next = -1;  // of equal weights, the last ones
        for (int i = 0; i < 257; i++) {
            if (weights[i] && (least < 0 || weights[i] <= weights[least]))
                next = least, least = i;
            else if (weights[i] && (next < 0 || weights[i] <= weights[next]))
                next = i;
        }
        if (next < 0)
            break;
        weights[least] += weights[next];
        weights[next] = 0;
        for (int i = 0; i < 257; i++)
            if (tree[i] == least || tree[i] == next)
                tree[i] = least, sizes[i]++;
    }
    for (const int size : sizes)
        of_size[size]++;
    for (int size = 257; size > 16; size--)
        for (; of_size[size]; of_size[size] -= 2, of_size[size - 1]++) {
            int shorter = size - 2;
            while (!of_size[shorter])
                shorter--;
            of_size[shorter + 1] += 2;
            of_size[shorter]--;
        }
    int longest = 16;
    while (!of_size[longest])
        longest--;
    of_size[longest]--;  // the one that isn't written
    std::string code(of_size + 1, of_size + 17);
    for (int size = 1; size <= 257; size++)
        for (int i = 0; i < 256; i++)
            if (sizes[i] == size)
                code += static_cast<char>(i);
    return code;
}

class Writer {
  public:
    explicit Writer(std::string& out) : out_(out) {}

    void add(int code, const std::string& huffman) {
        size_t symbol = 16;
        for (int size = 1, next = 0; size <= 16; size++, next <<= 1)
            for (int i = 0; i < huffman[size - 1]; i++, next++)
                codes_[code][huffman[symbol++] & 255] = {static_cast<uint16_t>(next), static_cast<uint8_t>(size)};
        const size_t length = 3 + huffman.size();
        out_ += {'\xff', '\xc4', static_cast<char>(length >> 8), static_cast<char>(length),
                 static_cast<char>(code < 4 ? code : 0x10 | (code - 4))};
        out_ += huffman;
    }

    void add(const std::vector<Token>& tokens) {
        int restarts = 0;
        for (const Token& token : tokens) {
            if (token.code == RESTART) {
                align();
                out_ += {'\xff', static_cast<char>(0xd0 + restarts++ % 8)};
                continue;
            }
            const Code& code = codes_[token.code][token.symbol];
            put(code.bits, code.size);
            put(token.bits, token.symbol & 15);
        }
        align();
    }

  private:
    struct Code {
        uint16_t bits;
        uint8_t size;
    };

    void put(uint32_t bits, int size) {
        waiting_ = waiting_ << size | bits;
        for (count_ += size; count_ >= 8;) {
            count_ -= 8;
            const char byte = static_cast<char>(waiting_ >> count_);
            out_ += byte;
            if (byte == '\xff')
                out_ += '\0';
        }
    }

    void align() {  // with ones
        if (count_)
            put((1 << (8 - count_)) - 1, 8 - count_);
    }

    std::string& out_;
    Code codes_[8][256] = {};
    uint32_t waiting_ = 0;
    int count_ = 0;
};

bool rewrite(const uint8_t* bytes, size_t size, int wanted, std::string& out) {
    Header header = {};
    if (!read_header(bytes, size, header))
        return false;
    const int interval = interval_of(header.mcus_across, header.blocks, wanted);
    Tokens tokens(header, interval);
    tokens.tokens.reserve(size);  // about what there are
    if (!read_blocks(header, bytes + size, {0, 0, header.mcus_down, header.mcus_across}, true, tokens) || tokens.failed)
        return false;

    out.reserve(size + size / 16);
    out.assign("\xff\xd8", 2);
    for (const uint8_t *at = bytes + 2, *next; at < header.sos; at = next) {
        next = at + 2 + (at[2] << 8 | at[3]);
        if (at[1] != 0xc4 && at[1] != 0xdd)
            out.append(at, next);
    }
    out += {'\xff', '\xdd', 0, 4, static_cast<char>(interval >> 8), static_cast<char>(interval)};
    Writer writer(out);
    for (int code = 0; code < 8; code++)
        if (std::any_of(tokens.counts[code], tokens.counts[code] + 256, [](int64_t count) { return count > 0; }))
            writer.add(code, best_code(tokens.counts[code]));
    out.append(header.sos, header.scan);
    writer.add(tokens.tokens);
    // The scan's end is the marker that is neither a restart nor stuffing; `read_blocks` has found it.
    const uint8_t* end = header.scan;
    while (end[0] != 0xff || end[1] == 0 || (end[1] >= 0xd0 && end[1] <= 0xd7))
        end++;
    out.append(end, bytes + size);
    return true;
}

}  // namespace

// Rewrites a file of `size` bytes; `mcus` from 1 to 64. Returns how long the result is, which is in `room` if it fits
// into `most` bytes; or -1 where the file isn't taken.
extern "C" int64_t tile_jpeg(const uint8_t* bytes, int64_t size, int mcus, uint8_t* room, int64_t most) try {
    std::string out;
    if (size < 0 || !rewrite(bytes, static_cast<size_t>(size), mcus, out))
        return -1;
    if (static_cast<int64_t>(out.size()) <= most)
        std::memcpy(room, out.data(), out.size());
    return static_cast<int64_t>(out.size());
} catch (const std::exception&) {  // no memory
    return -1;
}
