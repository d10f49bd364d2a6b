// The entropy-coded data of a JPEG: its restart segments, and the blocks in them.

#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "jpeg_huffman.h"

namespace convneur::jpeg {

constexpr size_t SLACK = 4096;  // bytes past a segment that may be read: an MCU has 6 * 64 * 26 bits at most

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

// Block (x, y) of those that a component has in an MCU.
struct Block {
    int component, x, y;
    const Table *dc, *ac;
    int* first;  // the component's last first coefficient
};

// Reads segments, and hands their blocks to a sink. It has start(column, row), which tells it of an MCU; room(), ROOM
// zeros for a block's coefficients, of which the k-th goes to PLACES.of[k]; and take(block, only_first), which takes
// them.
template <typename Sink>
class Lane {
  public:
    Lane(Scan& scan, Sink& sink) : scan_(scan), sink_(sink) {
        for (int c = 0; c < scan.header.components; c++) {
            const Component& component = scan.header.component[c];
            for (int i = 0; i < component.across * component.down; i++)
                blocks_[count_++] = {c, i % component.across, i / component.across, &scan.tables.dc[component.dc],
                                     &scan.tables.ac[component.ac], &dc_[c]};
        }
        going_ = next_segment() && skip();
    }

    static void run(Lane& lane) {
        while (lane.going_) {
            Bits bits = lane.bits_;
            lane.sink_.start(lane.column_, lane.row_);
            for (int i = 0; i < lane.count_; i++) {
                const Block& block = lane.blocks_[i];
                int k;
                int16_t* const room = lane.sink_.room();
                lane.begin(block, bits, k, room);
                lane.end(block, bits, k, room);
                lane.sink_.take(block, k == END);
            }
            lane.move_on(bits);
        }
    }

    // Two lanes side by side while both have something to read.
    static void run(Lane& a, Lane& b) {
        while (a.going_ && b.going_) {
            Bits a_bits = a.bits_, b_bits = b.bits_;
            a.sink_.start(a.column_, a.row_);
            b.sink_.start(b.column_, b.row_);
            for (int i = 0; i < a.count_; i++) {
                const Table& table = *a.blocks_[i].ac;
                int a_k, b_k;
                int16_t *const a_room = a.sink_.room(), *const b_room = b.sink_.room();
                a.begin(a.blocks_[i], a_bits, a_k, a_room);
                b.begin(b.blocks_[i], b_bits, b_k, b_room);
                while (a_k < 63 && b_k < 63) {
                    a_bits.refill();
                    b_bits.refill();
                    for (int j = 0; j < 3 && a_k < 63 && b_k < 63; j++) {
                        a_bits.next_ones(table, a_k, a_room);
                        b_bits.next_ones(table, b_k, b_room);
                    }
                }
                a.end(a.blocks_[i], a_bits, a_k, a_room);
                b.end(b.blocks_[i], b_bits, b_k, b_room);
                a.sink_.take(a.blocks_[i], a_k == END);
                b.sink_.take(b.blocks_[i], b_k == END);
            }
            a.move_on(a_bits);
            b.move_on(b_bits);
        }
        run(a);
        run(b);
    }

  private:
    __attribute__((always_inline)) void begin(const Block& block, Bits& bits, int& k, int16_t* room) {
        const int first = *block.first += bits.first(*block.dc, k);
        room[0] = static_cast<int16_t>(first);
        odd_ |= (first + 2048) & ~4095;
    }

    // Reads what is left of a block.
    __attribute__((always_inline)) void end(const Block& block, Bits& bits, int& k, int16_t* room) {
        while (k < 63) {
            bits.refill();
            for (int j = 0; j < 4 && k < 63; j++)
                bits.next_ones(*block.ac, k, room);
        }
        odd_ |= k & WRONG;
    }

    // Moves on after an MCU to the next one that is needed.
    void move_on(const Bits& bits) {
        going_ = is_sound(bits) && (move() || next_segment()) && skip();
    }

    // Past MCUs that aren't needed; false where none is left.
    bool skip() {
        while (!scan_.needed.has(column_, row_)) {
            Bits bits = bits_;
            for (int i = 0; i < count_; i++) {
                int k;
                begin(blocks_[i], bits, k, unwanted_);
                end(blocks_[i], bits, k, unwanted_);
            }
            if (!is_sound(bits) || (!move() && !next_segment()))
                return false;
        }
        return true;
    }

    // Whether an MCU was sound, and its segment has not ended before it.
    bool is_sound(const Bits& bits) {
        bits_ = bits;
        const bool sound = odd_ == 0 && left() >= 0;
        scan_.failed |= !sound;
        return sound;
    }

    ptrdiff_t left() const { return (segment_.end - bits_.next) * 8 + bits_.count; }  // bits

    // To the segment's next MCU; false at its end.
    bool move() {
        if (++column_ == scan_.header.mcus_across) {
            column_ = 0;
            row_++;
        }
        return ++mcu_ < segment_.stop;
    }

    bool next_segment() {
        scan_.failed |= segment_.stop == segment_.all && left() >= 8;  // bytes are left
        if (scan_.failed || scan_.next_segment == scan_.segments.size())
            return false;
        segment_ = scan_.segments[scan_.next_segment++];
        bits_ = {};
        bits_.next = segment_.begin;
        std::fill_n(dc_, 3, 0);
        mcu_ = segment_.first;
        row_ = mcu_ / scan_.header.mcus_across;
        column_ = mcu_ % scan_.header.mcus_across;
        return true;
    }

    Scan& scan_;
    Sink& sink_;
    Block blocks_[MOST_BLOCKS];
    Segment segment_ = {nullptr, nullptr, 0, 0, 1};
    Bits bits_;
    int count_ = 0, mcu_ = 0, row_ = 0, column_ = 0, dc_[3] = {}, odd_ = 0;
    bool going_ = false;
    int16_t unwanted_[ROOM];
};

}  // namespace convneur::jpeg
