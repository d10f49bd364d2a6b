// timm's augmentation of 8-bit RGB, (height, width, 3), to the bits of what its functions make with Pillow 13.
#pragma once

#include <cstdint>

namespace convneur {

// What is done, and its arguments. `resample` is Pillow's 2 for bilinear or 3 for bicubic; `fill` is a red, a green and
// a blue in 0 ... 255.
enum Code {
    kRotate = 0,        // degrees in [0, 360), cosine and sine as Pillow rounds them, resample, fill
    kShearX = 1,        // factor, resample, fill
    kShearY = 2,        // factor, resample, fill
    kTranslateX = 3,    // pixels, resample, fill
    kTranslateY = 4,    // pixels, resample, fill
    kTranslateXRel = 5, // share of the width, resample, fill
    kTranslateYRel = 6, // share of the height, resample, fill
    kAutoContrast = 7,
    kInvert = 8,
    kEqualize = 9,
    kPosterize = 10,    // bits kept, 0 ... 8: none makes black
    kSolarize = 11,     // threshold
    kSolarizeAdd = 12,  // added, 0 ... 255, threshold
    kColor = 13,        // factor
    kContrast = 14,     // factor
    kBrightness = 15,   // factor
    kSharpness = 16,    // factor
    kGaussianBlur = 17, // radius, 0 ... 100
};

struct Operation {
    double code, arguments[7];
};

// An image whose rows touch.
struct Picture {
    uint8_t* pixels;
    int height, width;

    uint8_t* row(int y) const { return pixels + 3 * static_cast<int64_t>(y) * width; }
    int64_t bytes() const { return 3 * static_cast<int64_t>(height) * width; }
};

// Whether `operate` does it to a picture of sides of 1 ... 65536 pixels.
bool is_known(const Operation& operation);

// Changes the picture; the operation is known.
void operate(const Picture& picture, const Operation& operation);

}  // namespace convneur

extern "C" {

// Changes an image of height x width x 3 bytes by `count` operations of eight numbers: code and arguments, the unused
// ones 0. Returns 0, 1 where one of them isn't known and nothing is changed, or 2 where there was too little memory.
int convneur_operate(uint8_t* image, int height, int width, const double* operations, int count);
}
