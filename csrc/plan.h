// The plan of a call on a GPU: its algorithm, its launches, and the bytes of the maps that they will move. All
// decisions are made here, in host code without a CUDA header, so that they can be tested on any machine.
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

constexpr int kThreads = 256;  // threads per block of two_pass
// Most threads of cluster blocks per SM (streaming multiprocessor), in blocks of 256 or 512: they leave 80 and 128
// registers per thread.
constexpr int kMostForwardThreads = 768, kMostBackwardThreads = 512;
constexpr int kGemvChunk = 1024;  // elements of a vector that are staged in shared memory for a product with a matrix
constexpr int kSamples = 4;   // samples per block of hidden and backward_hidden, which read the weights once for all
constexpr int kColumns = 32;  // columns of a matrix per warp, and of a tile of weight gradients

#ifdef __CUDACC__
#define SE_FUSED_BOTH __host__ __device__
#else
#define SE_FUSED_BOTH
#endif
// The offset at which the next vector begins in shared memory, so that it can be read in 16-byte accesses.
SE_FUSED_BOTH constexpr int64_t padded(int64_t numbers) { return (numbers + 3) / 4 * 4; }

// The offsets, in numbers, of the vectors of a cluster's block in shared memory. They follow the staged tiles and the
// memory that the steps use in turn (`work`). The planner counts shared memory by this layout, and the kernels use it;
// csrc/plan/cluster.cpp sizes the tiles and `work`.
//            forward                                 backward
//   own      z of the block's channels               dp2 of the block's channels
//   part     the block's part of W1 z                the block's part of dp2 W2
//   whole    h; z of all channels where R = 0        dp1; dp2 of all channels where R = 0
//   gates    s of the block's channels               s and dz / L of the block's channels; two numbers more per channel
//                                                    for the maximum
struct ClusterLayout {
  int64_t own, part, whole, gates;

  SE_FUSED_BOTH constexpr ClusterLayout(int64_t work, int64_t channels, int64_t r, int64_t depth)
      : own(work), part(own + padded(channels)), whole(part + padded(r)), gates(whole + padded(depth)) {}
};

// The limits of a device that decisions depend on.
struct Device {
  std::string name;
  int capability;  // 90 for sm_90
  int sm_count;
  int64_t shared_per_block, shared_per_sm;  // bytes: the most that one block can have; what all blocks of an SM share
  // How many clusters of 1, 2, 4, 8 and 16 blocks can run at once with one block per SM. More than one block needs
  // sm_90; one block is a cluster from sm_80 on.
  std::array<int, 5> clusters;
  double bytes_per_us;  // bytes that a copy reads and writes per microsecond
  int64_t l2_bytes;
};
// Known GPUs. Where nobody has measured the numbers of clusters, they are predicted.
const std::vector<Device>& device_presets();

enum class Algorithm : int32_t { kTwoPass, kCluster, kBatchNorm };

enum class Direction : int32_t { kForward, kBackward };

// Everything about a call that its plan depends on.
struct Call {
  Direction direction;
  int64_t n, c, r, l;  // r = 0: the one-FC form
  bool channels_last;
  DType dtype;
  int alignment;  // the largest power of two, up to 16, that divides the address of every map
  Squeeze squeeze;
  bool pre_act;    // whether there is an activation, or scale and shift, before the squeeze
  bool post_act;   // whether there is an activation at the end
  bool residual;   // whether the residual is a map of its own; if it is x, it is read only once
  bool saves_p1;   // forward: p1 is an output, so it needs no scratch
  bool dx;         // backward: whether dx is an output
  bool dresidual;  // backward: whether dresidual is an output
  bool dw;         // backward: whether any gradient of a weight or bias is an output
};

// Every member of a Call. The binding below does not compile if a Call has one more; padding is not compared.
inline auto members(const Call& call) {
  const auto& [direction, n, c, r, l, channels_last, dtype, alignment, squeeze, pre_act, post_act, residual, saves_p1,
               dx, dresidual, dw] = call;
  return std::tie(direction, n, c, r, l, channels_last, dtype, alignment, squeeze, pre_act, post_act, residual,
                  saves_p1, dx, dresidual, dw);
}
inline bool operator==(const Call& a, const Call& b) { return members(a) == members(b); }

Call call_of(const Forward& f);
Call call_of(const Backward& f);
Call call_of(const BatchNorm& f);

// A reduction over the positions of each (sample, channel), into `splits` partial results.
struct Reduction {
  int vec_bytes;  // bytes per access
  // NCHW: threads per row of L positions: 8, 32 or 256; 1 to 32 for rows in shared memory. channels_last: threads per
  // row of channels, which is one position.
  int threads_per_row;
  int splits;  // parts into which the positions are divided
  // NCHW, for rows that are not a multiple of 16 bytes: the rows that a block first stages in shared memory, or 0, and
  // the bytes of a staged tile of one map.
  int64_t rows, staged_bytes;
  int64_t channel_blocks;  // channels_last: blocks side by side along the channels
};

// The elementwise step. Each block first computes the gates of its channels, or scale and shift of a batch norm.
struct Elementwise {
  int vec_bytes;           // bytes per access
  int64_t channel_blocks;  // channels_last: blocks side by side along the channels
  int64_t per_block;       // NCHW: elements per block; channels_last: positions per block
  int64_t ranges;          // blocks per sample; channels_last: blocks per sample and channel block
  int64_t channels;        // the most channels per block
};

// How the blocks of a cluster hold a sample in shared memory.
struct ClusterConfig {
  int size;                        // blocks per cluster
  int64_t channels;                // channels per block
  int64_t staged_bytes;            // bytes of a block's staged tile of one map
  int64_t work;                    // numbers that the steps of a block need in turn
  bool stages_x, stages_residual;  // backward: whether x and the residual are staged besides g
  // The clusters that can begin together, and the delay between the starts of two of them: while some wait for their
  // exchange and their layers, others use the memory.
  int64_t first_wave;
  unsigned stagger_ns;
};

struct Launch {
  const char* name;  // the kernel is called <name>_kernel
  int64_t blocks;
  int64_t shared_bytes;
  int cluster;  // blocks per cluster; 0: no clusters
  int threads;  // threads per block
};

// The predicted time of a plan in microseconds (plan/model.cpp).
struct Prediction {
  double launches;  // starting the launches
  double memory;    // moving the bytes
  double work;      // the instructions of the busiest SM
  double waiting;   // latency: loads, exchanges and layers that wait for one another
  double us() const { return launches + std::max(memory, work) + waiting; }
};

struct Plan {
  Call call;
  Algorithm algorithm;
  Reduction reduction;
  Elementwise elementwise;
  bool fused_hidden;             // two_pass: each block of the last launch computes h itself
  ClusterConfig cluster_config;  // cluster
  int64_t shared_per_block;      // the limit of the device
  std::string other;             // why the plan uses no other algorithm
  Prediction predicted;
  int launch_count;
  std::array<Launch, 4> launches;
  int64_t map_bytes_read, map_bytes_written;
  int64_t scratch_bytes;

  void add(const char* name, int64_t blocks, int64_t shared_bytes, int cluster = 0, int threads = kThreads);
  const Launch& launch(std::string_view name) const;
  std::string text() const;
};

// Raises std::invalid_argument, which names the limit, if no plan can run the call. `forced` overrides the planner, for
// tests and experiments: words separated by spaces.
//   two_pass: two_pass, vec_bytes=, threads_per_row=, splits=, per_block=, rows=, fused_hidden= (forward)
//   cluster:  cluster, vec_bytes=, threads_per_row=, size=, threads=
Plan make_plan(const Call& call, const Device& device, const std::string& forced = "");

// The plans of a BatchNorm, and of the scale and shift of a Norm with so many channels. Both have one launch and no
// choices. Raises std::invalid_argument as make_plan does.
Plan plan_batch_norm(const Call& call, const Device& device);
Plan plan_scale_shift(int64_t channels);

}  // namespace se
