#include "operations.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "affine.h"
#include "tones.h"

namespace convneur {
namespace {

bool is_within(double value, double least, double most) { return value >= least && value <= most; }

bool is_whole(double value, double least, double most) {
    return is_within(value, least, most) && value == std::floor(value);
}

// resample and fill.
bool is_resampling(const double* arguments) {
    return (arguments[0] == 2 || arguments[0] == 3) && is_whole(arguments[1], 0, 255) &&
           is_whole(arguments[2], 0, 255) && is_whole(arguments[3], 0, 255);
}

void resample(const Picture& picture, const Matrix& matrix, const double* arguments) {
    uint8_t fill[3];
    for (int c = 0; c < 3; c++) fill[c] = static_cast<uint8_t>(arguments[1 + c]);
    transform(picture, matrix, arguments[0] == 3, fill);
}

void turn(const Picture& picture, const double* arguments) {
    uint8_t fill[3];
    for (int c = 0; c < 3; c++) fill[c] = static_cast<uint8_t>(arguments[4 + c]);
    rotate(picture, arguments[0], arguments[1], arguments[2], arguments[3] == 3, fill);
}

constexpr double kFar = 1e6;  // pixels; a factor or a shift beyond it isn't looked at

}  // namespace

bool is_known(const Operation& operation) {
    const double* a = operation.arguments;
    if (!is_whole(operation.code, kRotate, kGaussianBlur)) return false;
    switch (static_cast<Code>(operation.code)) {
        case kRotate:
            return a[0] >= 0 && a[0] < 360 && is_within(a[1], -1, 1) && is_within(a[2], -1, 1) && is_resampling(a + 3);
        case kShearX:
        case kShearY:
        case kTranslateX:
        case kTranslateY:
        case kTranslateXRel:
        case kTranslateYRel: return is_within(a[0], -kFar, kFar) && is_resampling(a + 1);
        case kPosterize: return is_whole(a[0], 0, 8);
        case kSolarize: return std::isfinite(a[0]);
        case kSolarizeAdd: return is_whole(a[0], 0, 255) && std::isfinite(a[1]);
        case kColor:
        case kContrast:
        case kBrightness:
        case kSharpness: return is_within(a[0], -kFar, kFar);
        case kGaussianBlur: return is_within(a[0], 0, 100);
        case kAutoContrast:
        case kInvert:
        case kEqualize: return true;
    }
    return false;
}

void operate(const Picture& picture, const Operation& operation) {
    const double* a = operation.arguments;
    switch (static_cast<Code>(operation.code)) {
        case kRotate: return turn(picture, a);
        case kShearX: return resample(picture, {1, a[0], 0, 0, 1, 0}, a + 1);
        case kShearY: return resample(picture, {1, 0, 0, a[0], 1, 0}, a + 1);
        case kTranslateX: return resample(picture, {1, 0, a[0], 0, 1, 0}, a + 1);
        case kTranslateY: return resample(picture, {1, 0, 0, 0, 1, a[0]}, a + 1);
        case kTranslateXRel: return resample(picture, {1, 0, a[0] * picture.width, 0, 1, 0}, a + 1);
        case kTranslateYRel: return resample(picture, {1, 0, 0, 0, 1, a[0] * picture.height}, a + 1);
        case kAutoContrast: return auto_contrast(picture);
        case kInvert: return invert(picture);
        case kEqualize: return equalize(picture);
        case kPosterize: return posterize(picture, static_cast<int>(a[0]));
        case kSolarize: return solarize(picture, a[0]);
        case kSolarizeAdd: return solarize_add(picture, static_cast<int>(a[0]), a[1]);
        case kColor: return color(picture, static_cast<float>(a[0]));
        case kContrast: return contrast(picture, static_cast<float>(a[0]));
        case kBrightness: return brightness(picture, static_cast<float>(a[0]));
        case kSharpness: return sharpness(picture, static_cast<float>(a[0]));
        case kGaussianBlur: return gaussian_blur(picture, static_cast<float>(a[0]));
    }
}

}  // namespace convneur

extern "C" int convneur_operate(uint8_t* image, int height, int width, const double* operations, int count) try {
    constexpr int kLongest = 1 << 16;
    if (height < 1 || width < 1 || height > kLongest || width > kLongest || count < 0) return 1;
    std::vector<convneur::Operation> all(count);
    for (int i = 0; i < count; i++) {
        all[i].code = operations[8 * i];
        std::copy_n(operations + 8 * i + 1, 7, all[i].arguments);
        if (!convneur::is_known(all[i])) return 1;
    }
    for (const auto& operation : all) convneur::operate({image, height, width}, operation);
    return 0;
} catch (...) {
    return 2;
}
