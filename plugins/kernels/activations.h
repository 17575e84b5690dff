// Quantised activations, as `quantize_activations` writes and `quantized_matmul` reads them.
//
// Rows are taken 32 at a time (the last block may have fewer). A block is a list over the groups of 32 along K, and in
// each group a list over the block's rows: what a tile of weights meets next is what comes next in memory, for one row
// and for many. Nothing is padded: M rows of K take M * K / 32 * 40 bytes.
#pragma once

#include "kernel.h"

enum { GROUP = 32, BLOCK_ROWS = 32 };

// 32 activations x[i] of one row: x[i] = scale * (codes[i] - 128), rounded. Codes carry an excess of 128 because the
// dot product of bytes wants one operand without sign, and the weights have one.
typedef struct {
  uint8_t codes[GROUP];
  float scale;
  float sum;  // of all 32 as they were rounded: the partner of a format's minimum
} activation_group;

_Static_assert(sizeof(activation_group) == 40, "the layout is shared with the caller, who allocates it");

// Group 0 of a row; its next group lies `stride` further.
INLINE size_t activation_index(size_t rows, size_t groups, size_t row, size_t* stride) {
  size_t first = row / BLOCK_ROWS * BLOCK_ROWS;
  *stride = min_size(BLOCK_ROWS, rows - first);
  return first * groups + (row - first);
}
