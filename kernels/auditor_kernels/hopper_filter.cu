// Threshold filter for Hopper: a persistent TMA + wgmma GEMM that writes no output matrix.
//
// C[token, feature] = x[token, :] . W[feature, :] + bias stays in registers; elements above the token's floor (and
// the feature's own threshold) are appended to the token's candidate list as 64-bit keys (see keys.py).
//
// One CTA = a producer warpgroup and two consumer warpgroups of 64 tokens each. CTAs come in pairs along tokens:
// each loads its own x tile and half of the W tile, multicast to both. The second consumer stays SKEW steps of
// depth behind the first, so that the epilogue of one runs under the products of the other. The epilogue compares
// everything and then stores, without a branch, the groups of four elements in which something passes; idle warps
// of the producer warpgroup carry what passes to global memory while the next tile is computed.
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
constexpr int GROUPS = 160;      // of 4 elements that a warp may keep of a tile; its later threads' tokens overflow
constexpr int RASTER = 16 / CLUSTER;  // cluster rows whose x stays in L2 while W streams past
constexpr int OVERFLOW_MARK = 1 << 20;
constexpr int LAST_FEATURE = 0x3FFFFFFF;

// Shared memory: stages | kept groups [8 warps][GROUPS] of 4 floats | which [2 wg][128] | their
// places [8 warps][GROUPS] | floors [128] | columns [2 wg] | barriers
constexpr int OFF_GROUPS = STAGES * STAGE_BYTES;
constexpr int OFF_WHICH = OFF_GROUPS + 8 * GROUPS * 16;
constexpr int OFF_PLACES = OFF_WHICH + 2 * 128 * 4;
constexpr int OFF_FLOORS = OFF_PLACES + 8 * GROUPS * 4;
constexpr int OFF_COLUMNS = OFF_FLOORS + BM * 4;
constexpr int OFF_BARRIERS = OFF_COLUMNS + 2 * BN * 8;
constexpr int SMEM_BYTES = OFF_BARRIERS + 2 * STAGES * 8 + 1024;
static_assert(SMEM_BYTES <= 227 * 1024, "shared memory");
static_assert(OFF_COLUMNS % 16 == 0 && OFF_BARRIERS % 8 == 0, "alignment");

// Named barriers (0 is __syncthreads): a list is full, a list is empty, a consumer warpgroup among itself.
__device__ __forceinline__ int full_id(int wg) { return 1 + wg; }
__device__ __forceinline__ int empty_id(int wg) { return 3 + wg; }
__device__ __forceinline__ int group_id(int wg) { return 5 + wg; }
constexpr int AHEAD_ID = 7;  // the first consumer is SKEW steps into its tile

struct Tile { int token, feature; };

// Cluster rows in bands of RASTER, column by column within a band.
__device__ __forceinline__ Tile tile_of(int item, int cluster_rows, int columns, int rank) {
  const int band = item / (RASTER * columns), first = band * RASTER;
  const int rows = min(cluster_rows - first, RASTER), inside = item - band * RASTER * columns;
  return {((first + inside % rows) * CLUSTER + rank) * BM, (inside / rows) * BN};
}

template <Type TYPE> struct Sum { using T = float; };
template <> struct Sum<INT8> { using T = int; };

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

  // Registers a thread: 56 + 2 * 224 is what the launch gave, 3 * 168. To ask for more is to wait for ever.
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
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
      const float4* groups = (const float4*)(smem + OFF_GROUPS) + wg * 4 * GROUPS;
      const uint32_t* which = (const uint32_t*)(smem + OFF_WHICH) + wg * 128;
      uint32_t* places = (uint32_t*)(smem + OFF_PLACES) + wg * 4 * GROUPS;
      const float* lows = (const float*)(smem + OFF_FLOORS) + wg * 64;
      for (int item = cluster; item < items; item += clusters) {
        const Tile tile = tile_of(item, cluster_rows, columns, rank);
        bar_sync(full_id(wg), 160);
        int listed = 0;
        for (int i = 0; i < 4; i++) {  // list where each kept group is: slot | thread << 10 | columns << 17
          const int t = i * 32 + lane;
          uint32_t found = which[t];
          const int number = __popc(found), before = groups_before(number, lane);
          const bool fits = before + number <= GROUPS;
          if (!fits)
            for (int row = tile.token + wg * 64 + i * 16 + (lane >> 2), end = row + 8; row <= end; row += 8)
              if (row < T) atomicAdd(count + row, OVERFLOW_MARK);
          if (fits)
            for (int n = before; found; n++, found &= found - 1)
              places[listed + n] = (i * GROUPS + n) | t << 10 | (__ffs(found) - 1) << 17;
          listed += __reduce_max_sync(~0u, fits ? before + number : 0);
        }
        __syncwarp();
        for (int first = lane; first < listed; first += 64) {
          uint32_t place[2], pass[2] = {0, 0};
#pragma unroll
          for (int n = 0; n < 2; n++)
            if (first + 32 * n < listed) {
              place[n] = places[first + 32 * n];
              const float4 v = groups[place[n] & 1023];
              const int local = (place[n] >> 15 & 3) * 16 + (place[n] >> 12 & 7);
              const float low = lows[local], high = lows[local + 8];
              pass[n] = (v.x > low) | (v.y > low) << 1 | (v.z > high) << 2 | (v.w > high) << 3;
            }
          while (pass[0] | pass[1]) {  // mostly once, with two atomics in flight
            int row[2], at[2];
            unsigned long long key[2];
#pragma unroll
            for (int n = 0; n < 2; n++) {
              const int e = __ffs(pass[n]) - 1, feature = tile.feature + (place[n] >> 17) * 8 + (place[n] >> 10 & 3) * 2 + (e & 1);
              at[n] = cap;
              row[n] = tile.token + wg * 64 + (place[n] >> 15 & 3) * 16 + (place[n] >> 12 & 7) + (e & 2) * 4;
              if (pass[n]) {
                const float v = ((const float*)groups)[(place[n] & 1023) * 4 + e];
                key[n] = ((unsigned long long)__float_as_uint(v) << 32) | ((uint32_t)(LAST_FEATURE - feature) << 1);
                if (!HAS_THRESHOLD || v > threshold[feature]) at[n] = atomicAdd(count + row[n], 1);
              }
              pass[n] &= pass[n] - 1;
            }
#pragma unroll
            for (int n = 0; n < 2; n++)
              if (at[n] < cap) cand[(size_t)row[n] * cap + at[n]] = key[n];
          }
        }
        __syncwarp();
        bar_arrive(empty_id(wg), 160);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    const int wg = group - 1, t = tid & 127, quad = lane & 3;
    typename Sum<TYPE>::T acc[128];
    int stage = 0, phase = 0, turn = 0;
    const bool skewed = steps >= 2 * STAGES;  // else one consumer could be tiles ahead of the other
    float2* staged = (float2*)(smem + OFF_COLUMNS) + wg * BN;  // (bias, threshold or scale) of the tile's features
    for (int item = cluster; item < items; item += clusters, turn++) {
      const Tile tile = tile_of(item, cluster_rows, columns, rank);
      const int token = tile.token + wg * 64 + (t / 32) * 16 + (lane >> 2);
      // Loaded before the main loop and not touched until it ends, so that nothing waits for them.
      float2 column[2];
      float floor_[2];
      float4 own[2], most;
      int listed[2];
      if constexpr (TYPE == INT8) most = rounding.tile[tile.feature / BN];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int feature = tile.feature + 2 * t + i, row = token + 8 * i;
        column[i] = make_float2(-CUDART_INF_F, 0.f);
        if (feature < F) {
          column[i].x = bias[feature];
          if constexpr (HAS_THRESHOLD) column[i].y = threshold[feature];
          if constexpr (TYPE == INT8) column[i].y = rounding.feature_scale[feature];
        }
        floor_[i] = CUDART_INF_F;
        listed[i] = 0;
        own[i] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (row < T) {
          floor_[i] = floors[row];
          listed[i] = __ldcg(count + row);
          if constexpr (TYPE == INT8) own[i] = rounding.token[row];  // scale, rest, norm
        }
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
      float token_scale[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        if (floor_[i] < 0.f) floor_[i] = 0.f;  // not fmaxf: a floor that is no number must admit nothing
        token_scale[i] = own[i].x;
        if constexpr (TYPE == INT8) {
          const float by_x = own[i].x * most.x, by_w = own[i].y * most.y;
          floor_[i] = fmaxf(floor_[i], most.w) - rounding.coins * sqrtf(by_x * by_x + by_w * by_w) -
                      rounding.sums * (own[i].z * most.x + most.z);
        }
        if (listed[i] > cap) floor_[i] = CUDART_INF_F;  // recomputed anyway: stop appending to it
      }
      bar_sync(group_id(wg), 128);
      uint32_t found = 0;  // bit j: columns 8j + 2 quad + {0, 1} of the thread's two tokens hold what passes
#pragma unroll
      for (int j = 0; j < 32; j++) {
        const float4 two = *(const float4*)(staged + j * 8 + quad * 2);
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if constexpr (TYPE == INT8) v[i] = fmaf((float)acc[j * 4 + i] * (i & 1 ? two.w : two.y), token_scale[i / 2], i & 1 ? two.z : two.x);
          else v[i] = acc[j * 4 + i] + (i & 1 ? two.z : two.x);
          put(acc[j * 4 + i], v[i]);
        }
        bool any = v[0] > floor_[0] || v[1] > floor_[0] || v[2] > floor_[1] || v[3] > floor_[1];
        if (HAS_THRESHOLD) any = any && (v[0] > two.y || v[1] > two.w || v[2] > two.y || v[3] > two.w);
        if (any) found |= 1u << j;
      }
      const int number = __popc(found), before = groups_before(number, lane);
      if (turn > 0) bar_sync(empty_id(wg), 160);
      ((uint32_t*)(smem + OFF_WHICH))[wg * 128 + t] = found;
      if (quad == 0)
        for (int i = 0; i < 2; i++) ((float*)(smem + OFF_FLOORS))[wg * 64 + (t / 32) * 16 + (lane >> 2) + 8 * i] = floor_[i];
      if (before + number > GROUPS) found = 0;
      uint32_t at = base + OFF_GROUPS + ((wg * 4 + t / 32) * GROUPS + before) * 16;
#pragma unroll
      for (int j = 0; j < 32; j++) keep_group(at, found, 1u << j, acc + j * 4);
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
  const cuuint32_t depths = type == INT8 ? ROW_BYTES : ROW_BYTES / 2, box[2] = {depths, (cuuint32_t)box_rows}, element[2] = {1, 1};
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
