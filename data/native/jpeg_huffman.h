// Huffman codes of a JPEG as tables that give one or two coefficients a look-up, and the bits to look up.

#pragma once

#include <algorithm>
#include <cstring>

#include "jpeg_header.h"

namespace convneur::jpeg {

constexpr int LOOK = 10;                   // bits that are looked up at once
constexpr int MOST_DC = 11, MOST_AC = 10;  // bits of a value

// k is the last place in the zigzag that is known. At a block's end it is 63, or END and more; where a symbol is wrong,
// it has the bit of WRONG.
constexpr int WRONG = 64, END = 129;

// The value of so many bits at the buffer's top.
inline int extended(uint64_t buffer, int bits) {
    const int negative = static_cast<int>(buffer >> 63) - 1;
    return static_cast<int>(buffer >> 1 >> (63 - bits)) - (negative & ((1 << bits) - 1));
}

struct Table {
    // A symbol with its value: their bits; how far they move k; the value. A first coefficient's value isn't looked up:
    // `ahead` has its bits. What is longer than LOOK has 0 bits, and as its value the least that its code may have.
    struct Symbol {
        uint8_t bits = 0, ahead = WRONG;
        int16_t value = LOOK + 1;
    };
    // What LOOK bits begin with: a symbol; and two symbols as if they were one that moves to
    // the second's place, where that fits in.
    struct Entry {
        Symbol one, both;
    };
    Entry entries[1 << LOOK];
    int ends[17], starts[17];  // of codes of so many bits: the last one + 1; what is added for its symbol's place
    uint8_t code[16 + 256];    // as Header's
    bool is_set = false;

    // False if libjpeg finds the code wrong. Tables stay from image to image while codes do.
    bool set(const uint8_t* wanted, bool dc) {
        const int size = 16 + symbols_of(wanted);
        if (is_set && std::memcmp(code, wanted, size) == 0)
            return true;
        is_set = false;
        std::memcpy(code, wanted, size);
        int next = 0, symbol = 0;
        for (int bits = 1; bits <= 16; bits++, next <<= 1) {
            starts[bits] = symbol - next;
            if (code[bits - 1] && next + code[bits - 1] >= 1 << bits)
                return false;
            for (int i = 0; i < code[bits - 1]; i++, next++, symbol++) {
                if (dc && code[16 + symbol] > 15)
                    return false;
                if (bits <= LOOK)
                    fill(next << (LOOK - bits), bits, code[16 + symbol], dc);
            }
            ends[bits] = next;
            if (bits == LOOK)
                std::fill(entries + next, entries + (1 << LOOK), Entry{});
        }
        for (int i = 0; i < 1 << LOOK && !dc; i++) {
            const Symbol one = entries[i].one, second = entries[i << one.bits & ((1 << LOOK) - 1)].one;
            const int bits = one.bits + second.bits;
            if (one.ahead < WRONG && second.ahead != WRONG && bits <= LOOK)
                entries[i].both = {static_cast<uint8_t>(bits), static_cast<uint8_t>(one.ahead + second.ahead),
                                   second.value};
        }
        return is_set = true;
    }

    // What is at the buffer's top, however long.
    __attribute__((noinline)) Symbol long_symbol(Symbol found, uint64_t buffer, bool dc) const {
        int bits = found.value;
        while (bits <= 16 && static_cast<int>(buffer >> (64 - bits)) >= ends[bits])
            bits++;
        const int symbol = bits > 16 ? 0xff : code[16 + starts[bits] + (buffer >> (64 - bits))];
        return symbol_of(symbol, bits, buffer << bits, dc);
    }

  private:
    // Of a symbol whose code has so many bits, and the bits that follow it.
    static Symbol symbol_of(int symbol, int bits, uint64_t buffer, bool dc) {
        const int size = symbol & 15, run = symbol >> 4;
        if (dc)
            return {static_cast<uint8_t>(bits), static_cast<uint8_t>(symbol > MOST_DC ? WRONG : symbol), 0};
        const bool wrong = size > MOST_AC || (size == 0 && run != 0 && run != 15);
        return {static_cast<uint8_t>(bits + size), static_cast<uint8_t>(wrong ? WRONG : symbol == 0 ? END : run + 1),
                static_cast<int16_t>(extended(buffer, size))};
    }

    // Sets what begins with a code.
    void fill(int first, int bits, int symbol, bool dc) {
        Symbol one = symbol_of(symbol, bits, 0, dc);
        const int size = one.bits - bits, spare = LOOK - one.bits;
        if (spare < 0) {
            one = {0, WRONG, static_cast<int16_t>(bits)};
            std::fill_n(entries + first, 1 << (LOOK - bits), Entry{one, one});
        }
        for (int i = 0; i < 1 << size && spare >= 0; i++) {
            one.value = static_cast<int16_t>(extended(uint64_t(i) << (63 - size) << 1, size));
            std::fill_n(entries + first + (i << spare), 1 << spare, Entry{one, one});
        }
    }
};

// Where the zigzag's k-th coefficient lies in a block, row by row.
constexpr uint8_t NATURAL[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
                                 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
                                 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

// Where it goes when read: rows are PITCH apart, for two blocks to lie beside each other. What is past the end goes to
// a row of its own.
constexpr int PITCH = 16, ROOM = 9 * PITCH;

struct Places {
    uint8_t of[256];

    constexpr Places() : of() {
        for (int k = 0; k < 256; k++)
            of[k] = k < 64 ? NATURAL[k] / 8 * PITCH + NATURAL[k] % 8 : 8 * PITCH;
    }
};
constexpr Places PLACES;

// Bits from a segment whose stuffing is gone; reads up to 8 bytes past what is asked for.
struct Bits {
    uint64_t buffer;
    int count;  // valid in the buffer, at its top
    const uint8_t* next;

    ptrdiff_t left(const uint8_t* end) const { return (end - next) * 8 + count; }

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

    // A block's coefficients; the first one is a difference, which is added to `first`. Returns the last k.
    __attribute__((always_inline)) int read(const Table& dc, const Table& ac, int& first, int16_t* coefficients) {
        refill();
        Table::Symbol symbol = dc.entries[buffer >> (64 - LOOK)].one;
        if (__builtin_expect(symbol.bits == 0, 0))
            symbol = dc.long_symbol(symbol, buffer, true);
        drop(symbol.bits);
        const int size = symbol.ahead & (WRONG - 1);
        first += extended(buffer, size);
        drop(size);
        coefficients[0] = static_cast<int16_t>(first);
        int k = symbol.ahead & WRONG;
        while (k < 63) {
            refill();
            for (int i = 0; i < 4 && k < 63; i++)
                read_some(ac, k, coefficients);
        }
        return k;
    }

  private:
    // One or two coefficients, of LOOK bits at most; or one that is longer, and a refill. It needs LOOK bits.
    __attribute__((always_inline)) void read_some(const Table& table, int& k, int16_t* coefficients) {
        const Table::Entry& entry = table.entries[buffer >> (64 - LOOK)];
        const int one_at = k + entry.one.ahead, at = k + entry.both.ahead;
        if (__builtin_expect(at & WRONG, 0)) {
            refill();
            const Table::Symbol one = entry.one.bits ? entry.one : table.long_symbol(entry.one, buffer, false);
            drop(one.bits);
            k += one.ahead;
            coefficients[PLACES.of[k]] = one.value;
            refill();
            return;
        }
        drop(entry.both.bits);
        coefficients[PLACES.of[one_at]] = entry.one.value;
        coefficients[PLACES.of[at]] = entry.both.value;
        k = at;
    }
};

}  // namespace convneur::jpeg
