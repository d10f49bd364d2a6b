// Pillow's changes of each pixel by itself, or by its neighbours.
#pragma once

#include "operations.h"

namespace convneur {

void auto_contrast(const Picture& picture);
void equalize(const Picture& picture);
void invert(const Picture& picture);
void posterize(const Picture& picture, int bits);
void solarize(const Picture& picture, double threshold);
void solarize_add(const Picture& picture, int added, double threshold);

// Blends of something with the picture, beyond it where `factor` is above 1: its grey, its mean grey, black, or the
// picture smoothed.
void color(const Picture& picture, float factor);
void contrast(const Picture& picture, float factor);
void brightness(const Picture& picture, float factor);
void sharpness(const Picture& picture, float factor);

// Three box blurs each way.
void gaussian_blur(const Picture& picture, float radius);

}  // namespace convneur
