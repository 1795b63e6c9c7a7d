// Threshold filter for Hopper: a persistent TMA + wgmma GEMM that writes no output matrix.
//
// C[token, feature] = x[token, :] . W[feature, :] + bias stays in registers; elements above the token's floor (and
// the feature's own threshold) are appended to the token's candidate list as 64-bit keys (see keys.py).
//
// One CTA = a producer warpgroup and two consumer warpgroups of 64 tokens each. CTAs come in pairs along tokens:
// each loads its own x tile and half of the W tile, multicast to both. The second consumer stays SKEW steps of
// depth behind the first, so that the epilogue of one runs under the products of the other. The epilogue first
// compares everything, without a branch, then visits what some thread of the warp has found: a thread keeps what
// passes in slots of its own (no atomics), and idle warps of the producer warpgroup carry the slots to global
// memory while the next tile is computed.
//
// With 8-bit operands the sums are integers, the score is sum * token scale * feature scale + bias, and what
// passes is what the bound of int8_screen.py does not exclude: the floor is lowered by the largest error of the tile.
//
// Sizes are arbitrary: TMA fills out-of-range tokens, features and depth with zeros, the bias of a feature past
// the end is -inf and the floor of a token past the end +inf. Only a row's bytes must be a multiple of 16.
#include <cuda.h>
#include <cuda_runtime.h>
#include <math_constants.h>
#include <stdint.h>

#include "hopper_ptx.cuh"
#include "wgmma.inc"

enum Type { BF16, FP16, INT8 };

constexpr int BM = 128, BN = 256, ROW_BYTES = 128, STAGES = 4, CLUSTER = 2;
constexpr int X_BYTES = BM * ROW_BYTES, W_BYTES = BN * ROW_BYTES, STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int SKEW = 2;          // steps by which the second consumer follows the first
constexpr int SLOTS = 15;        // per thread and tile; more than this marks the thread's two tokens as overflowed
constexpr int ROOM = SLOTS + 5;  // four pushes may happen between two looks at the bound
constexpr int RASTER = 16 / CLUSTER;  // cluster rows whose x stays in L2 while W streams past
constexpr int OVERFLOW_MARK = 1 << 20;
constexpr int LAST_FEATURE = 0x3FFFFFFF;

// Shared memory: stages | values [2 wg][ROOM][128] | places, same shape | counts [2][128] | columns | barriers
constexpr int OFF_VALUES = STAGES * STAGE_BYTES;
constexpr int OFF_PLACES = OFF_VALUES + 2 * ROOM * 128 * 4;
constexpr int OFF_COUNTS = OFF_PLACES + 2 * ROOM * 128;
constexpr int OFF_COLUMNS = OFF_COUNTS + 2 * 128;
constexpr int OFF_BARRIERS = OFF_COLUMNS + 2 * BN * 8;
constexpr int SMEM_BYTES = OFF_BARRIERS + 2 * STAGES * 8 + 1024;
static_assert(SMEM_BYTES <= 227 * 1024, "shared memory");
static_assert(OFF_COLUMNS % 16 == 0 && OFF_BARRIERS % 8 == 0, "alignment");

// Named barriers (0 is __syncthreads): a list is full, a list is empty, a consumer warpgroup among itself.
__device__ __forceinline__ int full_id(int wg) { return 1 + wg; }
__device__ __forceinline__ int empty_id(int wg) { return 3 + wg; }
__device__ __forceinline__ int group_id(int wg) { return 5 + wg; }
constexpr int AHEAD_ID = 7;  // the first consumer is SKEW steps into its tile
// Keep v if it passes: predicated stores, no branch. A thread's slots are 512 and 128 bytes apart.
template <bool HAS_THRESHOLD>
__device__ __forceinline__ void push(uint32_t& value_at, uint32_t& place_at, float v, int place, float low, float own) {
  if constexpr (HAS_THRESHOLD)
    asm volatile("{\n.reg .pred p;\nsetp.gt.f32 p, %2, %4;\nsetp.gt.and.f32 p, %2, %5, p;\n"
                 "@p st.shared.f32 [%0], %2;\n@p st.shared.u8 [%1], %3;\n"
                 "@p add.u32 %0, %0, 512;\n@p add.u32 %1, %1, 128;\n}\n"
                 : "+r"(value_at), "+r"(place_at) : "f"(v), "r"(place), "f"(low), "f"(own) : "memory");
  else
    asm volatile("{\n.reg .pred p;\nsetp.gt.f32 p, %2, %4;\n"
                 "@p st.shared.f32 [%0], %2;\n@p st.shared.u8 [%1], %3;\n"
                 "@p add.u32 %0, %0, 512;\n@p add.u32 %1, %1, 128;\n}\n"
                 : "+r"(value_at), "+r"(place_at) : "f"(v), "r"(place), "f"(low) : "memory");
}

struct Tile { int token, feature; };

// Cluster rows in bands of RASTER, column by column within a band.
__device__ __forceinline__ Tile tile_of(int item, int cluster_rows, int columns, int rank) {
  const int band = item / (RASTER * columns), first = band * RASTER;
  const int rows = min(cluster_rows - first, RASTER), inside = item - band * RASTER * columns;
  return {((first + inside % rows) * CLUSTER + rank) * BM, (inside / rows) * BN};
}

template <Type TYPE> struct Sum { using T = float; };
template <> struct Sum<INT8> { using T = int; };
__device__ __forceinline__ void keep(float& sum, float v) { sum = v; }
__device__ __forceinline__ void keep(int& sum, float v) { sum = __float_as_int(v); }
__device__ __forceinline__ float kept(float sum) { return sum; }
__device__ __forceinline__ float kept(int sum) { return __int_as_float(sum); }

// What 8-bit operands need beyond the rest; see int8_screen.py. The last three are per feature, per token, and the
// largest (norm, scale, |bias|, least threshold) of each tile of BN features.
struct Rounding { const float *feature_scale; const float4 *token; const float4 *tile; float coins, sums; };

template <Type TYPE, bool HAS_THRESHOLD>
__global__ void __launch_bounds__(384, 1) __cluster_dims__(CLUSTER, 1, 1)
filter_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
              const float* __restrict__ bias, const float* __restrict__ threshold, const float* __restrict__ floors,
              int* __restrict__ count, unsigned long long* __restrict__ cand, const Rounding rounding, int cap, int T, int F,
              int steps) {
  constexpr int BK = TYPE == INT8 ? ROW_BYTES : ROW_BYTES / 2;
  extern __shared__ uint8_t raw_smem[];
  const uint32_t base = (smem_address(raw_smem) + 1023) & ~1023u;
  uint8_t* smem = raw_smem + (base - smem_address(raw_smem));
  const uint32_t full = base + OFF_BARRIERS, empty = full + STAGES * 8;
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const int tid = threadIdx.x, group = tid / 128, warp = tid / 32, lane = tid & 31;
  if (tid == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbar_init(full + 8 * i, 1);
      mbar_init(empty + 8 * i, 2 * CLUSTER);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  const int cluster_rows = (T + CLUSTER * BM - 1) / (CLUSTER * BM), columns = (F + BN - 1) / BN;
  const int items = cluster_rows * columns, cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == 0 && lane == 0) {  // the producer
      int stage = 0, phase = 0;
      for (int item = cluster; item < items; item += clusters) {
        const Tile tile = tile_of(item, cluster_rows, columns, rank);
        for (int k = 0; k < steps; k++) {
          mbar_wait(empty + 8 * stage, phase ^ 1);
          mbar_expect(full + 8 * stage, STAGE_BYTES);
          const uint32_t to = base + stage * STAGE_BYTES, half = rank * (W_BYTES / CLUSTER);
          tma_load(to, &x_map, full + 8 * stage, k * BK, tile.token);
          const int feature = tile.feature + rank * (BN / CLUSTER);
          if (CLUSTER > 1) tma_multicast(to + X_BYTES + half, &w_map, full + 8 * stage, k * BK, feature, (1 << CLUSTER) - 1);
          else tma_load(to + X_BYTES, &w_map, full + 8 * stage, k * BK, feature);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    } else if (warp == 1 || warp == 2) {  // the flushers, one per consumer warpgroup
      const int wg = warp - 1;
      const float* values = (const float*)(smem + OFF_VALUES) + wg * ROOM * 128;
      const uint8_t* places = smem + OFF_PLACES + wg * ROOM * 128;
      for (int item = cluster; item < items; item += clusters) {
        const Tile tile = tile_of(item, cluster_rows, columns, rank);
        bar_sync(full_id(wg), 160);
        int number[4], most = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          number[i] = (smem + OFF_COUNTS)[wg * 128 + i * 32 + lane];
          most = max(most, min(number[i], SLOTS));
        }
        for (int s = 0; s < most; s++) {
#pragma unroll
          for (int i = 0; i < 4; i++) {  // four atomics in flight
            const int at_slot = s * 128 + i * 32 + lane;
            if (s < number[i]) {
              const int place = places[at_slot], row = tile.token + wg * 64 + i * 16 + (lane >> 2) + (place & 2) * 4;
              const int feature = tile.feature + (place >> 2) * 8 + (lane & 3) * 2 + (place & 1);
              const int at = atomicAdd(count + row, 1);
              if (at < cap)
                cand[(size_t)row * cap + at] =
                    ((unsigned long long)__float_as_uint(values[at_slot]) << 32) | ((uint32_t)(LAST_FEATURE - feature) << 1);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (number[i] > SLOTS)
            for (int row = tile.token + wg * 64 + i * 16 + (lane >> 2), end = row + 8; row <= end; row += 8)
              if (row < T) atomicAdd(count + row, OVERFLOW_MARK);
        bar_arrive(empty_id(wg), 160);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int wg = group - 1, t = tid & 127, quad = lane & 3;
    typename Sum<TYPE>::T acc[128];
    int stage = 0, phase = 0, turn = 0;
    const bool skewed = steps >= 2 * STAGES;  // else one consumer could be tiles ahead of the other
    float2* staged = (float2*)(smem + OFF_COLUMNS) + wg * BN;  // (bias, threshold or scale) of the tile's features
    for (int item = cluster; item < items; item += clusters, turn++) {
      const Tile tile = tile_of(item, cluster_rows, columns, rank);
      const int token = tile.token + wg * 64 + (t / 32) * 16 + (lane >> 2);
      float2 column[2];
      float floor_[2], token_scale[2];
      for (int i = 0; i < 2; i++) {  // loaded before the main loop, used after it
        const int feature = tile.feature + 2 * t + i, row = token + 8 * i;
        column[i].x = feature < F ? bias[feature] : -CUDART_INF_F;
        column[i].y = 0.f;
        if (HAS_THRESHOLD && feature < F) column[i].y = threshold[feature];
        if (TYPE == INT8 && feature < F) column[i].y = rounding.feature_scale[feature];
        floor_[i] = row < T ? floors[row] : CUDART_INF_F;
        if (floor_[i] < 0.f) floor_[i] = 0.f;  // not fmaxf: a floor that is no number must admit nothing
        if constexpr (TYPE == INT8) {
          const float4 most = rounding.tile[tile.feature / BN];
          const float4 own = row < T ? rounding.token[row] : make_float4(0.f, 0.f, 0.f, 0.f);  // scale, rest, norm
          const float by_x = own.x * most.x, by_w = own.y * most.y;
          token_scale[i] = own.x;
          floor_[i] = fmaxf(floor_[i], most.w) - rounding.coins * sqrtf(by_x * by_x + by_w * by_w) -
                      rounding.sums * (own.z * most.x + most.z);
        }
        // A token that has overflowed is recomputed anyway: stop appending to it.
        if (row < T && __ldcg(count + row) > cap) floor_[i] = CUDART_INF_F;
      }
      int previous = -1;
      if (skewed && wg == 1) bar_sync(AHEAD_ID, 256);
      for (int k = 0; k < steps; k++) {
        mbar_wait(full + 8 * stage, phase);
        const uint32_t x_at = base + stage * STAGE_BYTES + wg * (64 * ROW_BYTES), w_at = base + stage * STAGE_BYTES + X_BYTES;
        const uint64_t x_desc = matrix_descriptor(x_at), w_desc = matrix_descriptor(w_at);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int kk = 0; kk < 4; kk++) {
          if constexpr (TYPE == INT8) wgmma_s8(acc, x_desc + 2 * kk, w_desc + 2 * kk, (k | kk) != 0);
          else if constexpr (TYPE == FP16) wgmma_f16(acc, x_desc + 2 * kk, w_desc + 2 * kk, (k | kk) != 0);
          else wgmma_bf16(acc, x_desc + 2 * kk, w_desc + 2 * kk, (k | kk) != 0);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        if (skewed && wg == 0 && k == SKEW - 1) bar_arrive(AHEAD_ID, 256);
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (previous >= 0 && t < CLUSTER) mbar_arrive_cluster(empty + 8 * previous, t);
        previous = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (t < CLUSTER) mbar_arrive_cluster(empty + 8 * previous, t);

      *(float4*)(staged + 2 * t) = make_float4(column[0].x, column[0].y, column[1].x, column[1].y);
      if (turn > 0) bar_sync(empty_id(wg), 160);
      bar_sync(group_id(wg), 128);
      const uint32_t first_value = base + OFF_VALUES + wg * ROOM * 512 + t * 4;
      const uint32_t first_place = base + OFF_PLACES + wg * ROOM * 128 + t;
      uint32_t value_at = first_value, place_at = first_place;
      uint32_t found = 0;  // bit j: columns 8j + 2 quad + {0, 1} of the thread's two tokens hold what passes
#pragma unroll
      for (int j = 0; j < 32; j++) {
        const float4 two = *(const float4*)(staged + j * 8 + quad * 2);
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if constexpr (TYPE == INT8) v[i] = fmaf((float)acc[j * 4 + i] * (i & 1 ? two.w : two.y), token_scale[i / 2], i & 1 ? two.z : two.x);
          else v[i] = acc[j * 4 + i] + (i & 1 ? two.z : two.x);
          keep(acc[j * 4 + i], v[i]);
        }
        bool any = v[0] > floor_[0] || v[1] > floor_[0] || v[2] > floor_[1] || v[3] > floor_[1];
        if (HAS_THRESHOLD) any = any && (v[0] > two.y || v[1] > two.w || v[2] > two.y || v[3] > two.w);
        if (any) found |= 1u << j;
      }
      found = __reduce_or_sync(~0u, found);
#pragma unroll
      for (int eight = 0; eight < 4; eight++) {
        if (!(found >> (eight * 8) & 0xff)) continue;
#pragma unroll
        for (int j = eight * 8; j < eight * 8 + 8; j++) {
          if (!(found >> j & 1)) continue;
          const float4 two = HAS_THRESHOLD ? *(const float4*)(staged + j * 8 + quad * 2) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
          for (int i = 0; i < 4; i++)
            push<HAS_THRESHOLD>(value_at, place_at, kept(acc[j * 4 + i]), j * 4 + i, floor_[i / 2], i & 1 ? two.w : two.y);
          value_at = min(value_at, first_value + (SLOTS + 1) * 512);
          place_at = min(place_at, first_place + (SLOTS + 1) * 128);
        }
      }
      (smem + OFF_COUNTS)[wg * 128 + t] = (value_at - first_value) / 512;
      __threadfence_block();
      bar_arrive(full_id(wg), 160);
    }
    if (turn > 0) bar_sync(empty_id(wg), 160);
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

static int encode_map(CUtensorMap* map, const void* data, int rows, int depth, int box_rows, Type type) {
  static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  if (!encode) {
    cudaDriverEntryPointQueryResult found;
    void* entry = nullptr;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (!entry) return -1;
    encode = (decltype(&cuTensorMapEncodeTiled))entry;
  }
  cuuint64_t size[2] = {(cuuint64_t)depth, (cuuint64_t)rows}, stride[1] = {(cuuint64_t)depth * (type == INT8 ? 1 : 2)};
  cuuint32_t box[2] = {type == INT8 ? ROW_BYTES : ROW_BYTES / 2, (cuuint32_t)box_rows}, element[2] = {1, 1};
  const CUtensorMapDataType types[] = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                       CU_TENSOR_MAP_DATA_TYPE_UINT8};
  return (int)encode(map, types[type], 2, (void*)data, size, stride, box, element, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

struct Call {
  const void *x, *w;
  const float *bias, *threshold, *floors;
  int* count;
  void* cand;
  Rounding rounding;
  int cap, T, F, D, programs;
  cudaStream_t stream;
};

template <Type TYPE, bool HAS_THRESHOLD>
static int launch(const Call& call) {
  CUtensorMap x_map, w_map;
  if (encode_map(&x_map, call.x, call.T, call.D, BM, TYPE)) return -1;
  if (encode_map(&w_map, call.w, call.F, call.D, BN / CLUSTER, TYPE)) return -2;
  auto kernel = filter_kernel<TYPE, HAS_THRESHOLD>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SMEM_BYTES);
  if (status != cudaSuccess) return (int)status;
  const int depth = TYPE == INT8 ? ROW_BYTES : ROW_BYTES / 2;
  kernel<<<call.programs / CLUSTER * CLUSTER, 384, SMEM_BYTES, call.stream>>>(
      x_map, w_map, call.bias, call.threshold, call.floors, call.count, (unsigned long long*)call.cand, call.rounding, call.cap,
      call.T, call.F, (call.D + depth - 1) / depth);
  return (int)cudaGetLastError();
}

// 0, a cudaError_t, or -1 / -2 when a tensor map could not be made. `threshold` may be null.
extern "C" int auditor_filter(const void* x, const void* w, const float* bias, const float* threshold, const float* floors,
                              int* count, void* cand, int cap, int T, int F, int D, int fp16, int programs, void* stream) {
  const Call call = {x, w, bias, threshold, floors, count, cand, {}, cap, T, F, D, programs, (cudaStream_t)stream};
  if (fp16) return threshold ? launch<FP16, true>(call) : launch<FP16, false>(call);
  return threshold ? launch<BF16, true>(call) : launch<BF16, false>(call);
}

// The same over int8 rows; `token` and `tile` hold four floats each, see `Rounding`.
extern "C" int auditor_filter_int8(const void* x, const void* w, const float* bias, const float* scale, const void* token,
                                   const void* tile, float coins, float sums, const float* floors, int* count, void* cand,
                                   int cap, int T, int F, int D, int programs, void* stream) {
  const Rounding rounding = {scale, (const float4*)token, (const float4*)tile, coins, sums};
  return launch<INT8, false>({x, w, bias, nullptr, floors, count, cand, rounding, cap, T, F, D, programs, (cudaStream_t)stream});
}
