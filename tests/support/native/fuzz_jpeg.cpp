// Feeds damaged JPEGs to the decoder and the rewriter, compiled with sanitizers:
//   fuzz_jpeg SEED INPUTS FILES...
// Those see whether memory is kept to. Whether a file is taken mustn't depend on the rectangle, and what is rewritten
// must be taken.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <vector>

#include "jpeg.h"

extern "C" int convneur_jpeg_decode(const uint8_t*, size_t, int, int, int, int, int, uint8_t*, ptrdiff_t);
extern "C" int64_t tile_jpeg(const uint8_t*, int64_t, int, uint8_t*, int64_t);

namespace {

using Random = std::mt19937_64;
using Bytes = std::vector<uint8_t>;

constexpr int64_t MOST_PIXELS = 1 << 16;  // larger ones cost too much time

int below(Random& random, int64_t count) { return static_cast<int>(random() % count); }

// Decodes a rectangle to memory of exactly its size, with room between the rows that must stay as it is.
bool taken(const Bytes& bytes, bool proven, const convneur::jpeg::Box& box, Random& random) {
    const size_t gap = below(random, 3), stride = 3 * size_t(box.width) + gap;
    const size_t room = stride * (box.height - 1) + 3 * size_t(box.width);
    const std::unique_ptr<uint8_t[]> out(new uint8_t[room]);
    for (int y = 0; y + 1 < box.height; y++)
        std::memset(out.get() + (y + 1) * stride - gap, 0xa5, gap);
    const bool result = convneur_jpeg_decode(bytes.data(), bytes.size(), proven, box.top, box.left, box.height,
                                             box.width, out.get(), stride) == 0;
    for (int y = 0; y + 1 < box.height; y++)
        for (size_t i = 0; i < gap; i++)
            if (out[(y + 1) * stride - gap + i] != 0xa5)
                std::abort();
    return result;
}

convneur::jpeg::Box some_box(int height, int width, Random& random) {
    convneur::jpeg::Box box{0, 0, 1 + below(random, height), 1 + below(random, width)};
    box.top = below(random, height - box.height + 1);
    box.left = below(random, width - box.width + 1);
    return box;
}

// Decodes a file, and mostly once more, another way. Returns whether it is taken.
bool try_one(const Bytes& bytes, Random& random) {
    convneur::jpeg::Header header;
    const bool read = convneur::jpeg::read_header(bytes.data(), bytes.size(), header);
    if (int64_t{header.height} * header.width > MOST_PIXELS)
        return false;
    const int height = read ? header.height : 40, width = read ? header.width : 40;
    const bool whole = random() % 4 == 0;
    const auto first = whole ? convneur::jpeg::Box{0, 0, height, width} : some_box(height, width, random);
    const bool result = taken(bytes, false, first, random);
    const int more = read ? below(random, 8) : 7;
    if (more == 0 && taken(bytes, false, some_box(height, width, random), random) != result)
        std::abort();
    if (more >= 1 && more <= 3 && !taken(bytes, true, some_box(height, width, random), random) && result)
        std::abort();
    if (more == 4) {
        Bytes room(bytes.size() + bytes.size() / 4 + 4096);
        const int64_t size = tile_jpeg(bytes.data(), bytes.size(), 1 + below(random, 8), room.data(), room.size());
        if (size >= 0 && (!result || size > static_cast<int64_t>(room.size())))
            std::abort();
        room.resize(std::max<int64_t>(size, 0));
        if (size >= 0 && !taken(Bytes(room), false, first, random))
            std::abort();
    }
    return result;
}

// Changes bits, bytes, lengths and order; most often near the start, where the tables lie, or where a marker is.
void mutate(Bytes& bytes, const std::vector<Bytes>& seeds, Random& random) {
    static constexpr uint8_t NUMBERS[] = {0, 1, 2, 3, 4, 7, 8, 15, 16, 17, 63, 64, 127, 128, 254, 255};
    for (int changes = 1 + below(random, 1 + below(random, 6)); changes > 0 && bytes.size() > 4; changes--) {
        const int size = static_cast<int>(bytes.size());
        int at = below(random, random() % 2 ? size : std::min(size, 700));
        if (random() % 4 == 0) {
            const auto* found = static_cast<const uint8_t*>(std::memchr(bytes.data() + at, 0xff, size - at));
            at = found ? std::min<int>(found - bytes.data() + below(random, 24), size - 1) : at;
        }
        const int length = std::min(size - at, 1 + below(random, 1 + below(random, 40)));
        switch (below(random, 9)) {
        case 0:
            bytes[at] ^= 1 << below(random, 8);
            break;
        case 1:
            bytes[at] = NUMBERS[below(random, sizeof NUMBERS)];
            break;
        case 2:
            bytes[at] = static_cast<uint8_t>(random());
            break;
        case 3:
            bytes.erase(bytes.begin() + at, bytes.begin() + at + length);
            break;
        case 4:
            bytes.insert(bytes.begin() + at, length, NUMBERS[below(random, sizeof NUMBERS)]);
            break;
        case 5: {  // a marker
            const uint8_t marker[] = {0xff, static_cast<uint8_t>(random() % 3 ? 0xd0 + below(random, 16) : random())};
            bytes.insert(bytes.begin() + at, marker, marker + 2);
            break;
        }
        case 6:
            bytes.resize(at);
            break;
        case 7: {  // a part moves
            const Bytes part(bytes.begin() + at, bytes.begin() + at + length);
            bytes.insert(bytes.begin() + below(random, size), part.begin(), part.end());
            break;
        }
        default: {  // a part of another file
            const Bytes& other = seeds[below(random, seeds.size())];
            const int from = below(random, other.size());
            const int most = std::min<int>(other.size() - from, length);
            for (int i = 0; i < most && at + i < size; i++)
                bytes[at + i] = other[from + i];
        }
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 4)
        return 2;
    Random random(std::strtoull(argv[1], nullptr, 10));
    std::vector<Bytes> seeds;
    for (int i = 3; i < argc; i++) {
        std::ifstream file(argv[i], std::ios::binary);
        seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        seeds.back().shrink_to_fit();
        if (!try_one(seeds.back(), random)) {
            std::fprintf(stderr, "%s isn't taken\n", argv[i]);
            return 1;
        }
    }
    const long long inputs = std::strtoll(argv[2], nullptr, 10);
    long long counted = 0;
    for (long long i = 1; i <= inputs; i++) {
        Bytes bytes = seeds[below(random, seeds.size())];
        mutate(bytes, seeds, random);
        counted += try_one(Bytes(bytes), random);  // a copy is exactly as long: what is read past its end is seen
        if (i % 100000 == 0)
            std::fprintf(stderr, "%lld of %lld\n", i, inputs);
    }
    std::printf("%lld of %lld taken, seed %s\n", counted, inputs, argv[1]);
}
