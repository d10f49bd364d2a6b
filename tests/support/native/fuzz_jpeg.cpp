// Feeds damaged JPEGs to the decoder, as libFuzzer does (-DCONVNEUR_LIBFUZZER), or with a mutator of its own:
//   fuzz_jpeg SEED INPUTS FILES...
// Whether a file is taken mustn't depend on the rectangle; sanitizers see whether memory is kept to.

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

namespace {

using Random = std::mt19937_64;
using Bytes = std::vector<uint8_t>;

int below(Random& random, int64_t count) { return static_cast<int>(random() % count); }

// Decodes a rectangle to memory of exactly its size, with room between the rows that must stay as it is.
bool taken(const uint8_t* data, size_t size, bool proven, const convneur::jpeg::Box& box, Random& random) {
    const size_t gap = below(random, 3), stride = 3 * size_t(box.width) + gap;
    const size_t room = stride * (box.height - 1) + 3 * size_t(box.width);
    const std::unique_ptr<uint8_t[]> out(new uint8_t[room]);
    std::memset(out.get(), 0xa5, room);
    const bool result =
        convneur_jpeg_decode(data, size, proven, box.top, box.left, box.height, box.width, out.get(), stride) == 0;
    for (int y = 0; y + 1 < box.height; y++)
        for (size_t i = 0; i < gap; i++)
            if (out[y * stride + 3 * size_t(box.width) + i] != 0xa5)
                std::abort();
    return result;
}

}  // namespace

// Rectangles of the first bytes' size at places that depend on the bytes. Returns how many decodes took the input.
static int try_one(const uint8_t* input, size_t size) {
    const std::unique_ptr<uint8_t[]> data(new uint8_t[size]);  // exactly as long
    std::memcpy(data.get(), input, size);
    uint64_t seed = size;
    for (size_t i = 0; i < size; i++)
        seed = seed * 0x9e3779b97f4a7c15 + input[i];
    Random random(seed);
    convneur::jpeg::Header header;
    int height = 1 + below(random, 64), width = 1 + below(random, 64);
    if (convneur::jpeg::read_header(data.get(), size, header) && int64_t{header.height} * header.width < 1 << 18) {
        height = header.height;
        width = header.width;
    }
    int count = 0;
    for (int i = 0; i < 4; i++) {
        convneur::jpeg::Box box{0, 0, height, width};
        if (i > 0) {
            box.height = 1 + below(random, height);
            box.width = 1 + below(random, width);
            box.top = below(random, height - box.height + 1);
            box.left = below(random, width - box.width + 1);
        }
        count += taken(data.get(), size, false, box, random);
        taken(data.get(), size, true, box, random);
    }
    if (count != 0 && count != 4)
        std::abort();
    std::vector<int16_t> blocks[3];
    const bool read = int64_t{header.height} * header.width < 1 << 18 &&
                      convneur::jpeg::read_coefficients(data.get(), size, header, blocks);
    if (read != (count > 0))
        std::abort();
    return count;
}

#ifdef CONVNEUR_LIBFUZZER
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try_one(data, size);
    return 0;
}
#else
namespace {

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
        if (try_one(seeds.back().data(), seeds.back().size()) != 4) {
            std::fprintf(stderr, "%s isn't taken\n", argv[i]);
            return 1;
        }
    }
    const long long inputs = std::strtoll(argv[2], nullptr, 10);
    long long counted = 0;
    for (long long i = 0; i < inputs; i++) {
        Bytes bytes = seeds[below(random, seeds.size())];
        mutate(bytes, seeds, random);
        counted += try_one(bytes.data(), bytes.size()) > 0;
    }
    std::printf("%lld of %lld taken\n", counted, inputs);
}
#endif
