// The plan of a convolution: how its output is cut into blocks, what is copied to scratch for each, and what every
// output reads there. inner_loops.h explains scratch, docs/cpu_kernels.md the other words.
#pragma once
#include <vector>

#include "routed_conv.h"

namespace sfg {

// The outputs along one axis that read through the same taps. Output line first + i * step, for i < count, reads the
// source at i * stride + offset(tap), which in scratch is slot i + slot(tap) of phase(tap).
struct Axis {
    int64_t first, step, count;
    int64_t stride, length;               // length of the source
    std::vector<int64_t> tap;             // places in the kernel; taps that only ever read padding are left out
    std::vector<int64_t> slot, phase_of;  // per tap
    std::vector<int64_t> phases;
    int64_t low, high;  // smallest and largest slot

    int64_t slots(int64_t outputs) const { return outputs + high - low; }
    int64_t zero_slots() const;  // zeros in front of the first output's source as well as behind the last's
};

// The same problem with rows as long as possible, because the loops run along them.
Shape with_long_rows(Shape);

// One axis of a convolution's output, and one of its input gradient: that has an Axis for each residue modulo the
// stride, because outputs of different residues read through different taps.
Axis forward_axis(const Shape&, int axis);
std::vector<Axis> gradient_axes(const Shape&, int axis);

// The distance between outputs that read the same source lines. With dilation it is more than one: between the lines
// that one output reads lie others that it doesn't.
int64_t apart(const Axis&);
// Cuts each axis into n axes, each of which has every n-th line.
std::vector<Axis> every(const std::vector<Axis>&, int64_t n);
// Cuts each axis by its own distance `apart`, so that a block copies only lines that its outputs read.
std::vector<Axis> undilated(const std::vector<Axis>&);

// Output channels [first, first + outputs) of one group, and the source channels that they read.
struct Tile {
    int64_t group, first, outputs;
    std::vector<Range> reads;
    int64_t reads_total;
    int64_t weights;  // offset of its packed weights, or gradients, in units of a whole kernel
};

// Tiles that share a copy of their sources: those of neighbouring groups that read overlapping channels. `reads` and
// `outputs` go from the first to the last channel of any of them.
struct Part {
    std::vector<Tile> tiles;
    Range reads, outputs;
};

// All parts of a convolution. transposed: for the input gradient, whose outputs are the columns. *weights gets the sum
// of outputs * reads_total over all tiles.
std::vector<Part> parts(const Blocks&, bool transposed, int64_t most_outputs, int64_t* weights);

// How the positions of an output are cut into blocks, and how a block lies in scratch.
struct Layout {
    int64_t rows, columns;  // of a block
    bool flat;              // all rows are worked on as one strip, with the gaps between them
    bool winograd;          // scratch holds transformed rows (winograd.h), a phase for each product
    int64_t groups;         // Winograd: groups of rows that are transformed together
    int64_t span, pitch;    // slots of a row, and the distance from row to row; narrow rows share zeros
    int64_t slack, phase_stride;
    int64_t source_stride;  // of a channel
    std::vector<Tap> taps;  // with Winograd those of one product

    Strips strips(int64_t block_rows, int64_t block_columns) const;
};

// What blocks and their layout have to respect.
struct Limits {
    int64_t lanes, size_of_number;  // of a vector; of a number, in bytes
    int64_t most_positions;         // of a block
    double flat_cost;               // of a position in a flat block, where it is 1 in other blocks
    bool outputs_too;               // do the outputs' channels lie in scratch as well?
    int64_t other_channels = 0;     // more channels that lie in scratch as well
    int64_t products = 0;           // Winograd: products whose sources are in scratch at a time; 0: plain sums
    int64_t together = 1;           // so many neighbouring rows must be in one block
};

// How many groups of winograd::ROWS have these rows, rounded up.
int64_t groups_of(int64_t rows);

// Can the rows of these axes be computed by Winograd's products, and is that less work? Work is counted in
// multiplications of a source by the weight of a tap or product. With products an output costs `combining` more; every
// tap or product costs `once` in an image.
bool suits_winograd(const std::vector<Axis>& vertical, const std::vector<Axis>& horizontal, const Limits&,
                    double combining, double once);

Layout layout(const Axis& vertical, const Axis& horizontal, int64_t rows, int64_t columns, const Limits&);

// One part of the channels at the outputs of two axes. All its blocks are computed in the same way.
struct Job {
    const Part* part;
    const Axis *vertical, *horizontal;
    Layout layout;
    int64_t column_blocks, first_item;  // blocks are called items and are counted through all jobs of an image
};

// All jobs of an image; they point into the arguments. *items gets the number of their blocks.
std::vector<Job> jobs(const std::vector<Part>&, const std::vector<Axis>& vertical, const std::vector<Axis>& horizontal,
                      const Limits&, int64_t* items);

// One item: a block of one job.
struct Patch {
    Patch(const std::vector<Job>&, int64_t item);

    const Job* job;
    int64_t row, rows, column, columns;
};

int64_t round_up(int64_t value, int64_t multiple);
// The stride of a channel in scratch that has so many numbers: an odd number of whole cache lines.
int64_t spread(int64_t numbers, int64_t size_of_number);

}  // namespace sfg
