// Quantised activations: what producers of codes write (quantize.h) and the kernels in products.h read.
//
// Rows are taken 32 at a time (the last block may have fewer). A block is a list over the groups of 32 along K, and in
// each group a list over the block's rows: what a tile of weights meets next is what comes next in memory, for one row
// and for many. Behind the records of all rows there is room for as many again, in the same order: a group that is
// rounded much more coarsely than others of its row has a second record there, of what the rounding left. So M rows of K
// take 2 * M * K / 32 * 48 bytes, of which the second half is hardly read.
#pragma once

#include "kernel.h"

enum { GROUP = 32, BLOCK_ROWS = 32 };

// With the smallest zero point there is, dot products start from it as it is; the others are multiples.
enum { CODE_SUM_FACTOR = -8 };

// 32 activations of one row: x[i] = scale * codes[i], rounded.
typedef struct {
  int8_t codes[GROUP];  // -127 to 127
  float scale;
  int32_t start;       // CODE_SUM_FACTOR * the sum of the codes: the partner of a format's zero point or minimum
  float scaled_start;  // scale * start
  int16_t low_start;   // of the first 16
  int16_t has_rest;    // whether there is a second record
} activation_group;

_Static_assert(sizeof(activation_group) == 48, "the layout is shared with the caller, who allocates it");

// Group 0 of a row; its next group lies `stride` further.
INLINE size_t activation_index(size_t rows, size_t groups, size_t row, size_t* stride) {
  size_t first = row / BLOCK_ROWS * BLOCK_ROWS;
  *stride = min_size(BLOCK_ROWS, rows - first);
  return first * groups + row - first;
}

// How far behind a record its second one lies.
INLINE size_t rest_distance(size_t rows, size_t groups) { return rows * groups; }
