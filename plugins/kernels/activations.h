// Quantised activations: what producers of codes write (quantize.h) and the kernels in products.h read.
//
// Rows are taken 32 at a time (the last block may have fewer). A block is a list over the groups of 32 along K, in each
// group a list over the block's rows, and for each row one record or two: what a tile of weights meets next is what
// comes next in memory, for one row and for many. Nothing is padded: M rows of K take M * K / 32 * terms * 48 bytes.
#pragma once

#include "kernel.h"

enum { GROUP = 32, BLOCK_ROWS = 32, MAX_TERMS = 2 };

// With the smallest zero point there is, dot products start from it as it is; the others are multiples.
enum { CODE_SUM_FACTOR = -8 };

// A term of 32 activations of one row. With one term x[i] = scale * codes[i] + offset, rounded; a second one holds what
// the rounding left, and has no offset.
typedef struct {
  int8_t codes[GROUP];  // -127 to 127
  float scale;
  float offset;
  int32_t start;      // CODE_SUM_FACTOR * the sum of the codes: the partner of a format's zero point or minimum
  int32_t low_start;  // the same of the first 16
} activation_group;

_Static_assert(sizeof(activation_group) == 48, "the layout is shared with the caller, who allocates it");

// Group 0 of a row; its next group lies `stride` further, its second term behind the first.
INLINE size_t activation_index(size_t rows, size_t groups, size_t terms, size_t row, size_t* stride) {
  size_t first = row / BLOCK_ROWS * BLOCK_ROWS;
  *stride = min_size(BLOCK_ROWS, rows - first) * terms;
  return (first * groups + row - first) * terms;
}
