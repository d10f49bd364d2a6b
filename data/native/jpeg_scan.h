// The entropy-coded data of a JPEG: its restart segments, and the blocks in them.

#pragma once

#include <algorithm>

#include "jpeg_huffman.h"

namespace convneur::jpeg {

// Memory that isn't zeroed, and stays for the next image unless it is large.
template <typename T>
class Scratch {
  public:
    T* of(size_t count) {
        if (count > count_) {
            memory_.reset();
            count_ = 0;
            memory_.reset(new T[count]);
            count_ = count;
        }
        return memory_.get();
    }
    void shrink() {
        if (count_ * sizeof(T) > 1 << 25)
            memory_.reset(), count_ = 0;
    }

  private:
    std::unique_ptr<T[]> memory_;
    size_t count_ = 0;
};

struct Segment {
    const uint8_t *begin, *end;  // without stuffing
    int first, stop, all;        // MCUs: from the first until the last that is read; and until the next marker
};

// The MCUs that are wanted.
struct Needed {
    int left, top, right, bottom, across;

    bool has(int column, int row) const { return column >= left && column < right && row >= top && row < bottom; }

    // How many MCUs of `first` to `end` must be read for those among them that are wanted.
    int stop(int first, int end) const {
        int row = (end - 1) / across, column = (end - 1) % across;
        if (row >= bottom)
            row = bottom - 1, column = across - 1;
        if (column < left)
            row--, column = across - 1;
        const int last = row * across + std::min(column, right - 1);
        return row >= top && last >= first ? last + 1 : first;
    }
};

// Takes the stuffing out, and finds the segments; false if anything is odd in them. Unless all of the data is read,
// only what is needed is copied to `copy`, which has room for the data and SLACK.
inline bool find_segments(const uint8_t* data, const uint8_t* end, const Header& header, const Needed* needed,
                          uint8_t* copy, std::vector<Segment>& segments) {
    const int mcus = header.mcus(), interval = header.interval ? header.interval : mcus;
    segments.clear();
    for (int first = 0;; first += interval) {
        const int all = std::min(mcus - first, interval) + first;
        const int stop = needed ? needed->stop(first, all) : all;
        uint8_t* const begin = copy;
        for (;;) {
            const auto* marker = static_cast<const uint8_t*>(std::memchr(data, 0xff, end - data));
            if (!marker || marker + 1 == end)
                return false;
            const size_t length = marker + (marker[1] == 0) - data;
            if (stop > first) {
                std::memcpy(copy, data, length);
                copy += length;
            }
            data = marker + 2;
            if (marker[1] == 0)
                continue;
            while (data[-1] == 0xff) {  // fill bytes
                if (data == end)
                    return false;
                data++;
            }
            break;
        }
        if (stop > first)
            segments.push_back({begin, copy, first, stop, all});
        if (all == mcus)
            return data[-1] == 0xd9;
        if (data[-1] != 0xd0 + first / interval % 8)
            return false;
    }
}

struct Tables {
    Table dc[4], ac[4];

    bool set(const Header& header) {
        for (int c = 0; c < header.components; c++) {
            const int d = header.component[c].dc, a = header.component[c].ac;
            if (!dc[d].set(header.dc[d], true) || !ac[a].set(header.ac[a], false))
                return false;
        }
        return true;
    }
};

// What lanes share.
struct Scan {
    const Header& header;
    const Tables& tables;
    const Needed& needed;
    const std::vector<Segment>& segments;
    size_t next_segment = 0;
    bool failed = false;
};

// Where the k-th coefficient goes; what is past the end goes to place 64.
struct Places {
    uint8_t of[256];

    constexpr Places() : of() {
        for (int k = 0; k < 256; k++)
            of[k] = k < 64 ? NATURAL[k] : 64;
    }
};
constexpr Places PLACES;

// Reads segments block by block. A sink has room for a block's coefficients, whose places are row by row, and takes it.
template <typename Sink>
class Lane {
  public:
    Lane(Scan& scan, Sink& sink) : scan_(scan), sink_(sink) {
        for (int c = 0; c < scan.header.components; c++) {
            const Component& component = scan.header.component[c];
            for (int i = 0; i < component.across * component.down; i++)
                blocks_[count_++] = {c, i % component.across, i / component.across, &scan.tables.dc[component.dc],
                                     &scan.tables.ac[component.ac]};
        }
        going_ = next_segment() && skip() && begin();
    }

    static void run(Lane& lane) {
        while (lane.going_) {
            State state = lane.state_;
            while (state.k < 63) {
                state.bits.refill();
                state.step();
                if (state.k < 63)
                    state.step();
            }
            lane.next(state);
        }
    }

    static void run(Lane& one, Lane& other) {
        State a = one.state_, b = other.state_;
        while (one.going_ && other.going_) {
            while (a.k < 63 && b.k < 63) {
                a.bits.refill();
                b.bits.refill();
                a.step();
                b.step();
            }
            if (a.k >= 63) {
                one.next(a);
                a = one.state_;
            }
            if (b.k >= 63) {
                other.next(b);
                b = other.state_;
            }
        }
        one.state_ = a;
        other.state_ = b;
        run(one);
        run(other);
    }

  private:
    struct Block {
        int component, x, y;
        const Table *dc, *ac;
    };

    // What is in registers while a block is read. k: the last place in the zigzag that is known.
    struct State {
        Bits bits;
        int k = 63;
        const Table* ac = nullptr;
        int16_t* coefficients = nullptr;

        __attribute__((always_inline)) void step() {
            const int value = bits.read(*ac, k);
            coefficients[PLACES.of[k]] = static_cast<int16_t>(value);
        }
    };

    // Hands a block on that has been read, and begins the next one.
    void next(const State& state) {
        state_ = state;
        const Block& block = blocks_[block_];
        going_ = is_sound(state.bits, state.k, block.component);
        if (!going_)
            return;
        if (wanted_)
            sink_.take(block.component, x_, y_, state.k == END);
        if (++block_ == count_) {
            block_ = 0;
            going_ = (move() || next_segment()) && skip();
        }
        going_ = going_ && begin();
    }

    bool begin() {
        const Block& block = blocks_[block_];
        const Component& component = scan_.header.component[block.component];
        x_ = column_ * component.across + block.x;
        y_ = row_ * component.down + block.y;
        wanted_ = sink_.wants(block.component, x_, y_);
        state_.coefficients = wanted_ ? sink_.room() : unwanted_;
        state_.bits.refill();
        state_.k = 0;
        state_.ac = block.ac;
        state_.coefficients[0] = static_cast<int16_t>(dc_[block.component] += state_.bits.read(*block.dc, state_.k));
        return true;
    }

    // To the segment's next MCU; false at its end.
    bool move() {
        if (++column_ == scan_.header.mcus_across) {
            column_ = 0;
            row_++;
        }
        return ++mcu_ < segment_.stop;
    }

    bool next_segment() {
        const bool whole = segment_.stop == segment_.all;
        if (whole && (segment_.end - state_.bits.next) * 8 + state_.bits.count >= 8)  // bytes are left
            scan_.failed = true;
        if (scan_.failed || scan_.next_segment == scan_.segments.size())
            return false;
        segment_ = scan_.segments[scan_.next_segment++];
        state_.bits = {};
        state_.bits.next = segment_.begin;
        std::fill_n(dc_, 3, 0);
        mcu_ = segment_.first;
        row_ = mcu_ / scan_.header.mcus_across;
        column_ = mcu_ % scan_.header.mcus_across;
        return true;
    }

    // Past MCUs that aren't needed; false where none is left.
    bool skip() {
        while (!scan_.needed.has(column_, row_)) {
            Bits bits = state_.bits;
            for (int i = 0; i < count_; i++) {
                const Block& block = blocks_[i];
                int k = 0;
                bits.refill();
                dc_[block.component] += bits.read(*block.dc, k);
                while (k < 63) {
                    bits.refill();
                    skip_some(bits, *block.ac, k);
                    if (k < 63)
                        skip_some(bits, *block.ac, k);
                }
                if (!is_sound(bits, k, block.component))
                    return false;
            }
            state_.bits = bits;
            if (!move() && !next_segment())
                return false;
        }
        return true;
    }

    __attribute__((always_inline)) static void skip_some(Bits& bits, const Table& ac, int& k) {
        const int several = ac.several[bits.buffer >> (64 - LOOK)], to = k + (several >> 8);
        // Symbols past the block's end are the next one's.
        if (__builtin_expect(several == 0 || (to >= 64 && to < END) || to >= END + 63, 0)) {
            bits.read(ac, k);
        } else {
            bits.drop(several & 255);
            k = to;
        }
    }

    // Whether a block was sound that ended at k, before its segment did.
    bool is_sound(const Bits& bits, int k, int component) {
        const bool sound = (k == 63 || k >= END) && (segment_.end - bits.next) * 8 + bits.count >= 0 &&
                           dc_[component] >= -2048 && dc_[component] < 2048;
        scan_.failed |= !sound;
        return sound;
    }

    Scan& scan_;
    Sink& sink_;
    Block blocks_[MOST_BLOCKS];
    int count_ = 0;
    Segment segment_ = {nullptr, nullptr, 0, 0, 1};
    State state_;
    int mcu_ = 0, row_ = 0, column_ = 0, block_ = 0, x_ = 0, y_ = 0, dc_[3] = {};
    bool wanted_ = false, going_ = false;
    int16_t unwanted_[80];
};

}  // namespace convneur::jpeg
