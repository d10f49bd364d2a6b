// Huffman codes of a JPEG as tables that give one or two coefficients a look-up, and the bits to look up.

#pragma once

#include <algorithm>
#include <cstring>

#include "jpeg_header.h"

namespace convneur::jpeg {

// Where the zigzag's k-th coefficient lies in a block, row by row.
constexpr uint8_t NATURAL[64] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
                                 41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
                                 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

constexpr int LOOK = 10;                   // bits that are looked up at once
constexpr int MOST_DC = 11, MOST_AC = 10;  // bits of a value

// k is the last place in the zigzag that is known. At a block's end it is 63, or END and more; where a symbol is wrong,
// it has the bit of WRONG.
constexpr int WRONG = 64, END = 129;

struct Table {
    // Of one or two symbols with their values: the bits of all, and of the first; how far they move k, and the first
    // does; the last one's value, and the first one's. Where a value is too long, bits is 0, ahead is WRONG, and
    // one_value has the code's bits and, from bit 8, the value's; it is 0 where the code is too long. A first
    // coefficient's value isn't looked up: ahead has its bits.
    struct Entry {
        uint8_t bits, one_bits, ahead, one_ahead;
        int16_t value, one_value;
    };
    Entry entries[1 << LOOK];
    int ends[17], starts[17];  // of codes of so many bits: the last one + 1; what is added for its symbol's place
    uint8_t code[16 + 256] = {};  // as Header's
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
            if (next + code[bits - 1] >= 1 << bits && code[bits - 1])
                return false;
            for (int i = 0; i < code[bits - 1]; i++, next++, symbol++) {
                if (dc && code[16 + symbol] > 15)
                    return false;
                if (bits <= LOOK)
                    fill(next << (LOOK - bits), bits, code[16 + symbol], dc);
            }
            ends[bits] = next;
            if (bits == LOOK)
                std::fill(entries + next, entries + (1 << LOOK), Entry{0, 0, WRONG, WRONG, 0, 0});
        }
        for (int i = (1 << LOOK) - 1; i >= 0 && !dc; i--)  // what comes second has been looked at less
            add_second(i);
        return is_set = true;
    }

    // What is at the buffer's top, however long.
    __attribute__((noinline)) Entry long_entry(Entry entry, uint64_t buffer, bool dc) const {
        int bits = entry.one_value & 255, of_value = entry.one_value >> 8, ahead = entry.one_ahead;
        if (bits == 0) {
            for (bits = LOOK + 1; bits <= 16 && static_cast<int>(buffer >> (64 - bits)) >= ends[bits];)
                bits++;
            const int symbol = bits > 16 ? 0xff : code[16 + starts[bits] + (buffer >> (64 - bits))];
            ahead = dc ? dc_ahead_of(symbol) : ahead_of(symbol);
            of_value = dc || ahead == WRONG ? 0 : symbol & 15;
        }
        const auto value = static_cast<int16_t>(extended(buffer << bits, of_value));
        const auto all = static_cast<uint8_t>(bits + of_value);
        return {all, all, static_cast<uint8_t>(ahead), static_cast<uint8_t>(ahead), value, value};
    }

    static int extended(uint64_t buffer, int bits) {  // the value of so many bits at the buffer's top
        const int negative = static_cast<int>(buffer >> 63) - 1;
        return static_cast<int>(buffer >> 1 >> (63 - bits)) - (negative & ((1 << bits) - 1));
    }

  private:
    static int dc_ahead_of(int symbol) { return symbol > MOST_DC ? WRONG : symbol; }

    static int ahead_of(int symbol) {
        const int bits = symbol & 15, run = symbol >> 4;
        if (bits > MOST_AC || (bits == 0 && run != 0 && run != 15))
            return WRONG;
        return symbol == 0 ? END : run + 1;
    }

    // Sets what begins with a code.
    void fill(int first, int bits, int symbol, bool dc) {
        const auto ahead = static_cast<uint8_t>(dc ? dc_ahead_of(symbol) : ahead_of(symbol));
        const int of_value = dc || ahead == WRONG ? 0 : symbol & 15, spare = LOOK - bits - of_value;
        const auto all = static_cast<uint8_t>(bits + of_value);
        if (spare < 0) {
            const auto lengths = static_cast<int16_t>(bits | of_value << 8);
            std::fill_n(entries + first, 1 << (LOOK - bits), Entry{0, 0, WRONG, ahead, 0, lengths});
            return;
        }
        for (uint64_t i = 0; i < uint64_t{1} << of_value; i++) {
            const auto value = static_cast<int16_t>(extended(i << (63 - of_value) << 1, of_value));
            std::fill_n(entries + first + (i << spare), 1 << spare, Entry{all, all, ahead, ahead, value, value});
        }
    }

    void add_second(int known) {
        Entry& entry = entries[known];
        const Entry& second = entries[known << entry.one_bits & ((1 << LOOK) - 1)];
        if (entry.one_bits == 0 || entry.one_ahead >= WRONG || second.one_bits == 0 || second.one_ahead == WRONG ||
            entry.one_bits + second.one_bits > LOOK)
            return;
        entry.bits = entry.one_bits + second.one_bits;
        entry.ahead = entry.one_ahead + second.one_ahead;
        entry.value = second.one_value;
    }
};

// Where the k-th coefficient goes: rows are PITCH apart, for two blocks to lie beside each other. What is past the end
// goes to a row of its own.
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

    ptrdiff_t left(const uint8_t* end) const { return (end - next) * 8 + count; }

    // A block's coefficients; the difference of the first one to `first` is added to that. Returns the last k.
    __attribute__((always_inline)) int read(const Table& dc, const Table& ac, int& first, int16_t* coefficients) {
        refill();
        Table::Entry entry = dc.entries[buffer >> (64 - LOOK)];
        if (__builtin_expect(entry.bits == 0, 0))
            entry = dc.long_entry(entry, buffer, true);
        drop(entry.bits);
        const int of_value = entry.ahead & (WRONG - 1);
        first += Table::extended(buffer, of_value);
        drop(of_value);
        coefficients[0] = static_cast<int16_t>(first);
        int k = entry.ahead & WRONG;
        while (k < 63) {
            refill();
            for (int i = 0; i < 4 && k < 63; i++)
                next_ones(ac, k, coefficients);
        }
        return k;
    }

    // One or two coefficients, of LOOK bits at most; or one that is longer, and a refill. It needs LOOK bits.
    __attribute__((always_inline)) void next_ones(const Table& table, int& k, int16_t* coefficients) {
        const Table::Entry& entry = table.entries[buffer >> (64 - LOOK)];
        const int at = k + entry.ahead, one_at = k + entry.one_ahead;
        if (__builtin_expect(at & WRONG, 0)) {
            refill();
            const Table::Entry one = entry.one_bits ? entry : table.long_entry(entry, buffer, false);
            drop(one.one_bits);
            k += one.one_ahead;
            coefficients[PLACES.of[k]] = one.one_value;
            refill();
            return;
        }
        drop(entry.bits);
        coefficients[PLACES.of[one_at]] = entry.one_value;
        coefficients[PLACES.of[at]] = entry.value;
        k = at;
    }
};

}  // namespace convneur::jpeg
