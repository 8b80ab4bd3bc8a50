// What to copy to scratch, and what every output reads there. See inner_loops.h for the words.
#pragma once
#include <vector>

#include "routed_conv.h"

namespace sfg {

// The outputs along one axis that read through the same taps: line first + i * step, i < count, reads the source at
// i * stride + offset(tap), which in scratch is slot i + slot(tap) of phase(tap).
struct Axis {
    int64_t first, step, count;
    int64_t stride, length;               // length of the source
    std::vector<int64_t> tap;             // place in the kernel; those that only ever read padding are left out
    std::vector<int64_t> slot, phase_of;  // per tap
    std::vector<int64_t> phases;
    int64_t low, high;  // smallest and largest slot

    int64_t slots(int64_t outputs) const { return outputs + high - low; }
    int64_t zero_slots() const;  // zeros in front of the first output's source as well as behind the last's
};

// The same problem with rows as long as they can be: the loops run along them.
Shape with_long_rows(Shape);

// One axis of the output of a convolution, and of its input gradient (one Axis for each residue mod stride).
Axis forward_axis(const Shape&, int axis);
std::vector<Axis> gradient_axes(const Shape&, int axis);

// How far apart outputs are whose sources are neighbours among each other's taps: dilation leaves lines between the
// taps that only others read.
int64_t apart(const Axis&);
// Each axis cut into several of every n-th line.
std::vector<Axis> every(const std::vector<Axis>&, int64_t n);
// As far apart as each axis wants.
std::vector<Axis> undilated(const std::vector<Axis>&);

// Output channels [first, first + outputs) of one group, and the source channels that they read.
struct Tile {
    int64_t group, first, outputs;
    std::vector<Range> reads;
    int64_t reads_total;
    int64_t weights;  // offset of its packed weights, or gradients, in units of a whole kernel
};

// Tiles of neighbouring groups that read overlapping channels, and the hull of these: they share a copy.
struct Part {
    std::vector<Tile> tiles;
    Range reads, outputs;
};

// transposed: for the input gradient, whose outputs are the columns. *weights: outputs * reads_total, summed over
// tiles.
std::vector<Part> parts(const Blocks&, bool transposed, int64_t most_outputs, int64_t* weights);

// How the positions of an output are cut into blocks, and how a block lies in scratch.
struct Layout {
    int64_t rows, columns;  // of a block
    bool flat;              // rows are worked on as one strip, with the gaps between them
    bool winograd;          // scratch holds transformed rows (winograd.h), a phase for each product
    int64_t groups;         // of rows that are transformed together
    int64_t span, pitch;    // slots of a row, and from row to row: narrow ones share zeros
    int64_t slack, phase_stride;
    int64_t source_stride;  // of a channel
    std::vector<Tap> taps;  // of one product, where there are any

    Strips strips(int64_t block_rows, int64_t block_columns) const;
};

// What a layout has to respect.
struct Limits {
    int64_t lanes, size_of_number;  // of a vector; of a number, in bytes
    int64_t most_positions;         // of a block
    double flat_cost;               // what a position costs in a flat block, compared to others
    bool outputs_too;               // do the outputs' channels lie in scratch, too?
    int64_t other_channels = 0;     // that lie in scratch, too
    int64_t products = 0;           // by Winograd: how many of them are in scratch at a time
    int64_t together = 1;           // rows, and columns, of which no part may be in a block
};

// How many groups of rows are transformed together to make so many (winograd.h).
int64_t groups_of(int64_t rows);

// Can the rows of these axes be made of Winograd's products, and is that less work? Counted in multiplications of a
// source by a tap's or product's weight: an output takes `combining` more by the products, and every tap or product
// `once` in an image.
bool suits_winograd(const std::vector<Axis>& vertical, const std::vector<Axis>& horizontal, const Limits&,
                    double combining, double once);

Layout layout(const Axis& vertical, const Axis& horizontal, int64_t rows, int64_t columns, const Limits&);

// Where one part of the channels meets the outputs of two axes: what is done alike, block by block.
struct Job {
    const Part* part;
    const Axis *vertical, *horizontal;
    Layout layout;
    int64_t column_blocks, first_item;  // blocks are items, counted through all jobs of an image
};

// The arguments must outlive the jobs. Returns the number of items of an image, too.
std::vector<Job> jobs(const std::vector<Part>&, const std::vector<Axis>& vertical, const std::vector<Axis>& horizontal,
                      const Limits&, int64_t* items);

// One item: a block of one job.
struct Patch {
    Patch(const std::vector<Job>&, int64_t item);

    const Job* job;
    int64_t row, rows, column, columns;
};

int64_t round_up(int64_t value, int64_t multiple);
// A channel's stride in scratch: whole cache lines, an odd number of them.
int64_t spread(int64_t numbers, int64_t size_of_number);

}  // namespace sfg
