// Resizes and augments images of random shapes, in buffers without a byte to spare, for sanitizers to look on.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "operations.h"
#include "resize.h"

namespace {

std::mt19937 generator(1);

int draw(int least, int most) { return std::uniform_int_distribution<int>(least, most)(generator); }

double draw_share() { return std::uniform_real_distribution<double>(-1.0, 1.0)(generator); }

std::unique_ptr<uint8_t[]> noise(size_t bytes) {
    std::unique_ptr<uint8_t[]> made(new uint8_t[bytes]);
    std::generate_n(made.get(), bytes, [] { return static_cast<uint8_t>(generator()); });
    return made;
}

int side() { return draw(1, draw(0, 3) ? 40 : 300); }

bool resize_one() {
    const int height = side(), width = side(), out_height = draw(0, 4) ? side() : height, out_width = draw(0, 4) ? side() : width;
    const int top = draw(0, out_height - 1), left = draw(0, out_width - 1);
    const int rows = draw(1, out_height - top), columns = draw(1, out_width - left), filter = draw(0, 2);
    int box[4];
    convneur_resize_support(height, width, filter, out_height, out_width, top, left, rows, columns, box);
    const int stride = 3 * box[3] + draw(0, 3);
    // The last row ends with its last pixel.
    const auto pixels = noise(static_cast<size_t>(stride) * (box[2] - 1) + 3 * box[3]);
    const auto out = noise(3 * static_cast<size_t>(rows) * columns);
    return !convneur_resize_part(pixels.get(), stride, box, height, width, filter, out_height, out_width, top, left, rows,
                                 columns, draw(0, 1), draw(0, 1), out.get());
}

bool operate_one() {
    const int height = side(), width = side(), code = draw(0, 17);
    const double resample = draw(2, 3), share = draw_share();
    double operation[8] = {static_cast<double>(code), share, resample, 1, 2, 3, 0, 0};
    if (code == 0) {
        const double degrees[] = {0, 90, 180, 270, 45.5};
        const double turn[] = {degrees[draw(0, 4)], share, draw_share(), resample, 1, 2, 3};
        std::copy_n(turn, 7, operation + 1);
    } else if (code == 3 || code == 4) {
        operation[1] = share * 400;
    } else if (code == 10) {
        operation[1] = draw(0, 8);
    } else if (code == 11 || code == 12) {
        operation[1] = draw(0, 255);
        operation[2] = 128;
    } else if (code >= 13) {
        operation[1] = std::abs(share) * (draw(0, 3) ? 3 : 90);
    }
    const auto image = noise(3 * static_cast<size_t>(height) * width);
    return !convneur_operate(image.get(), height, width, operation, 1);
}

}  // namespace

int main(int, char** arguments) {
    const int rounds = std::atoi(arguments[1]);
    for (int i = 0; i < rounds; i++)
        if (!resize_one() || !operate_one()) {
            std::printf("round %d was refused\n", i);
            return 1;
        }
    return 0;
}
