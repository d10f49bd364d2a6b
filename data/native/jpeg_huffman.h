// Huffman-coded blocks of a JPEG. Codes and the values that follow them are looked up together; two restart segments
// are read in lock step, so that the processor has something to do while it waits for a look-up.

#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "jpeg_header.h"

namespace convneur::jpeg {

constexpr int LOOK = 11;                   // bits that are looked up at once
constexpr int END = 128, WRONG = 64;       // what is added to k at a block's end, and where there is no such code
constexpr int MOST_DC = 11, MOST_AC = 10;  // bits of a value
constexpr size_t SLACK = 512;              // bytes: a block has 63 * 26 + 27 bits at most, and 8 bytes are read at once

// A Huffman code as tables.
struct Table {
    // Of a symbol: `bits` to drop; `ahead` for k, the place in the zigzag; its value. Where that takes longer than a
    // look-up, `bits` is 0, and `value` has the code's bits and, from bit 8, how many follow; or 0, for a long code.
    struct Entry {
        uint8_t bits, ahead;
        int16_t value;

        int all_bits() const { return bits ? bits : (value & 255) + (value >> 8); }
    };
    Entry entries[1 << LOOK];
    uint16_t several[1 << LOOK];  // AC: of as many symbols as are known: bits | ahead << 8; 0: none is
    int ends[17], starts[17];     // of the codes of so many bits: the first that is longer, and where symbols start
    HuffmanCode code;
    bool of_dc = false;

    // False if libjpeg finds the code wrong.
    bool set(const HuffmanCode& wanted, bool dc) {
        if (code.given && of_dc == dc && std::memcmp(&code, &wanted, sizeof code) == 0)
            return true;
        code.given = false;
        std::memset(entries, 0, sizeof entries);
        int next = 0, symbol = 0;
        for (int bits = 1; bits <= 16; bits++, next <<= 1) {
            starts[bits] = symbol - next;
            for (int i = 0; i < wanted.counts[bits]; i++, next++, symbol++) {
                if (dc && wanted.symbols[symbol] > 15)
                    return false;
                if (bits <= LOOK && next < 1 << bits)
                    fill(next << (LOOK - bits), bits, dc, wanted.symbols[symbol]);
            }
            if (next >= 1 << bits && wanted.counts[bits])
                return false;
            ends[bits] = next;
        }
        if (!dc)
            for (int i = 0; i < 1 << LOOK; i++)
                several[i] = combined(i);
        code = wanted;
        of_dc = dc;
        return true;
    }

    // An entry for what is at the buffer's top, however long.
    __attribute__((noinline)) Entry long_entry(Entry entry, uint64_t buffer) const {
        int bits = entry.value & 255, of_value = entry.value >> 8, ahead = entry.ahead;
        if (bits == 0) {
            for (bits = LOOK + 1; bits <= 16 && static_cast<int>(buffer >> (64 - bits)) >= ends[bits];)
                bits++;
            const int symbol = bits > 16 ? 0xff : code.symbols[starts[bits] + (buffer >> (64 - bits))];
            ahead = ahead_of(of_dc, symbol);
            of_value = ahead == WRONG ? 0 : symbol & 15;
        }
        const int value = of_value ? extended(buffer << bits >> (64 - of_value), of_value) : 0;
        return {static_cast<uint8_t>(bits + of_value), static_cast<uint8_t>(ahead), static_cast<int16_t>(value)};
    }

    static int ahead_of(bool dc, int symbol) {
        const int bits = symbol & 15, run = symbol >> 4;
        if (dc)
            return symbol > MOST_DC ? WRONG : 0;
        if (bits > MOST_AC || (bits == 0 && run != 0 && run != 15))
            return WRONG;
        return symbol == 0 ? END : run + 1;
    }

    static int extended(uint64_t bits, int count) {  // a value of so many bits
        return static_cast<int>(bits) - (bits >> (count - 1) ? 0 : (1 << count) - 1);
    }

  private:
    void fill(int first, int bits, bool dc, int symbol) {
        const uint8_t ahead = ahead_of(dc, symbol);
        const int of_value = ahead == WRONG ? 0 : symbol & 15, rest = LOOK - bits - of_value;
        for (int i = 0; i < 1 << (LOOK - bits); i++) {
            const int value = rest < 0 ? bits | of_value << 8 : of_value ? extended(i >> rest, of_value) : 0;
            entries[first + i] = {static_cast<uint8_t>(rest < 0 ? 0 : bits + of_value), ahead,
                                  static_cast<int16_t>(value)};
        }
    }

    uint16_t combined(int known) const {
        int used = 0, ahead = 0;
        while (used < LOOK && ahead < 63) {
            const Entry& entry = entries[known << used & ((1 << LOOK) - 1)];
            const int bits = entry.all_bits();
            // The first symbol's value needn't be looked up whole; what follows must be known.
            if (bits == 0 || entry.ahead == WRONG || (used && used + bits > LOOK))
                break;
            used += bits;
            ahead += entry.ahead;
        }
        return used | ahead << 8;
    }
};

// Bits from a segment whose stuffing is gone; reads up to 8 bytes past what is asked for.
struct Bits {
    uint64_t buffer = 0;
    int count = 0;  // valid in the buffer, at its top
    const uint8_t* next = nullptr;

    void refill() {  // to 56 bits and more
        uint64_t word;
        std::memcpy(&word, next, 8);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        word = __builtin_bswap64(word);
#endif
        buffer |= word >> count;
        next += (63 - count) >> 3;
        count |= 56;
    }
    void drop(int bits) {
        buffer <<= bits;
        count -= bits;
    }

    // Reads a symbol and its value, of 27 bits at most; moves k on.
    __attribute__((always_inline)) int read(const Table& table, int& k) {
        Table::Entry entry = table.entries[buffer >> (64 - LOOK)];
        if (__builtin_expect(entry.bits == 0, 0))
            entry = table.long_entry(entry, buffer);
        drop(entry.bits);
        k += entry.ahead;
        return entry.value;
    }
};

}  // namespace convneur::jpeg
