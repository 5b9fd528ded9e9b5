// The plan of a call on a GPU: which algorithm, which launches, and the bytes of the maps that they will move.
// Pure host code without a CUDA header, so that the decisions are tested on any machine. Nothing else chooses.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "se.h"

namespace se {

constexpr int kThreads = 256;  // in a block of two_pass
// Of a cluster on a multiprocessor, in blocks of 256 or 512: 80 and 128 registers each.
constexpr int kMostForwardThreads = 768, kMostBackwardThreads = 512;
constexpr int kTile = 1024;   // of a vector in shared memory while a matrix is multiplied by it
constexpr int kSamples = 4;   // that share one reading of the weights, where any do
constexpr int kColumns = 32;  // of a matrix that a warp takes; of a tile of weight gradients

#ifdef __CUDACC__
#define SE_FUSED_BOTH __host__ __device__
#else
#define SE_FUSED_BOTH
#endif
// Where the next vector of numbers begins in shared memory, so that each can be read in 16 bytes.
SE_FUSED_BOTH constexpr int64_t padded(int64_t numbers) { return (numbers + 3) / 4 * 4; }

// Where the vectors of a cluster's block begin in shared memory, in numbers, after its slabs and what its steps need in
// turn (`work`). The planner counts by it, and the kernels read and write by it.
//            forward                     backward
//   own      z of its channels           dp2 of its channels
//   part     its part of W1 z            its part of W2^T dp2
//   whole    h; where R = 0, z of all    dp1; where R = 0, dp2 of all
//   gates    s of its channels           s and its share of dz of its channels; for the maximum two numbers more
struct ClusterLayout {
  int64_t own, part, whole, gates;

  SE_FUSED_BOTH constexpr ClusterLayout(int64_t work, int64_t channels, int64_t r, int64_t depth)
      : own(work), part(own + padded(channels)), whole(part + padded(r)), gates(whole + padded(depth)) {}
};

// The limits of a device that decisions depend on.
struct Device {
  std::string name;
  int capability;  // 90 for sm_90
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;  // bytes: what a block can ask for; what all its blocks share
  // How many clusters of 1, 2, 4, 8 and 16 blocks can run at once, each block alone on its multiprocessor: from sm_90.
  std::array<int, 5> clusters;
  double bytes_per_us;  // of a copy, what is read and what is written
  int64_t l2_bytes;
};
// Known GPUs. Numbers of clusters that nobody has measured are predicted.
const std::vector<Device>& device_presets();

enum class Algorithm : int32_t { kTwoPass, kCluster };

enum class Direction : int32_t { kForward, kBackward };

// All that a plan depends on.
struct Call {
  Direction direction;
  int64_t n, c, r, l;  // r = 0: the one-FC form
  bool channels_last;
  DType dtype;
  int alignment;    // the largest power of two, up to 16, that divides the address of every map
  Squeeze squeeze;  //
  bool pre_act;     // whether there is one; so are the following
  bool post_act;    //
  bool residual;    // a map of its own; x as its own residual is read only once
  bool keeps;       // forward: p1 is wanted, so it needs no scratch
  bool dx;          // backward: which gradients are wanted
  bool dresidual;   //
  bool dw;          // any of the weights' and biases'
};

// Every member of a Call: with one more, this does not compile. Padding has no say.
inline auto members(const Call& call) {
  const auto& [direction, n, c, r, l, channels_last, dtype, alignment, squeeze, pre_act, post_act, residual, keeps, dx,
               dresidual, dw] = call;
  return std::tie(direction, n, c, r, l, channels_last, dtype, alignment, squeeze, pre_act, post_act, residual, keeps,
                  dx, dresidual, dw);
}
inline bool operator==(const Call& a, const Call& b) { return members(a) == members(b); }

Call call_of(const Forward& f);
Call call_of(const Backward& f);

// A reduction over the positions of each (sample, channel), into `splits` partial results.
struct Reduction {
  int width;   // bytes of an access
  int lanes;   // NCHW: threads along a row: 8, 32, 256; in shared memory 1 to 32. channels_last: along channels
  int splits;  // parts that the positions are cut into
  // NCHW: rows that a block copies to shared memory first, where accesses of 16 bytes do not fit them, or 0; and the
  // bytes of that copy, for each map.
  int64_t rows, slab_bytes;
  int64_t chunks;  // channels_last: blocks side by side along the channels
};

// What is done element by element, with the gates of its channels computed first by each block.
struct Elementwise {
  int width;          // bytes of an access
  int64_t chunks;     // channels_last: blocks side by side along the channels
  int64_t per_block;  // NCHW: elements of a sample; channels_last: positions
  int64_t ranges;     // blocks per sample (and chunk)
  int64_t channels;   // at most so many in a block
};

// How the blocks of a cluster hold a sample in shared memory.
struct Residence {
  int size;                      // blocks
  int64_t channels;              // that each has and excites
  int64_t slab_bytes;            // of its share of one map
  int64_t work;                  // numbers that its steps need in turn
  bool keeps_x, keeps_residual;  // backward: beside g
  // Clusters that could begin together, and how much later than the one before each of them begins: while some wait for
  // their own exchange and layers, others use the memory.
  int64_t first_wave;
  unsigned stagger_ns;
};

struct Launch {
  const char* name;
  int64_t blocks;
  int64_t shared_bytes;
  int cluster;  // blocks; 0: no cluster
  int threads;  // in a block
};

// What a plan is predicted to take, in microseconds (plan/model.cpp).
struct Prediction {
  double launches;  // starting them
  double memory;    // moving the bytes
  double work;      // the instructions of the busiest multiprocessor
  double waiting;   // for one thing after another: loads, exchanges, the layers
  double us() const { return launches + std::max(memory, work) + waiting; }
};

struct Plan {
  Call call;
  Algorithm algorithm;
  Reduction reduction;
  Elementwise elementwise;
  bool fused_hidden;         // two_pass: each block of the last launch computes h itself
  Residence residence;       // cluster
  int64_t shared_per_block;  // the limit of the device
  std::string other;         // why no other algorithm
  Prediction predicted;
  int launch_count;
  std::array<Launch, 4> launches;
  int64_t map_bytes_read, map_bytes_written;
  int64_t scratch_bytes;

  void add(const char* name, int64_t blocks, int64_t shared_bytes, int cluster = 0, int threads = kThreads);
  const Launch& launch(std::string_view name) const;
  std::string text() const;
};

// Raises std::invalid_argument, naming the limit, where no plan serves the call. `forced`, for tests and experiments:
// any of two_pass, width=, lanes=, splits=, per_block=, rows= and fused_hidden= (forward), or any of cluster, width=,
// lanes=, size= and threads=, separated by spaces.
Plan make_plan(const Call& call, const Device& device, const std::string& forced = "");

}  // namespace se
