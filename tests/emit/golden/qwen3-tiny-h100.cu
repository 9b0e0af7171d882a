// qwen3-tiny for NVIDIA H100 80GB SXM sm_90a, plan 0ca135fb6a643242: generated, do not edit.
// 4 stages, 9 kinds of task, 132 blocks, one per SM.
#include "runtime/program.cuh"

namespace plan {

constexpr mpk::u32 shared_limit = 232448;
constexpr mpk::u32 ring_slots = 53;
constexpr mpk::u32 slot_bytes = 4096;
constexpr mpk::u32 copies_in_flight = 12;
constexpr mpk::u32 copies_while_looking = 12;
constexpr mpk::u32 prefetch_chunks = 32;
constexpr mpk::u32 prefetch_every = 1;
constexpr mpk::u32 prefetch_clocks = 275;
constexpr mpk::u32 num_stages = 4;
constexpr mpk::u32 num_layers = 3;
constexpr mpk::u32 num_templates = 3;
constexpr mpk::u32 num_weights = 5;
constexpr mpk::u32 num_events = 8;
constexpr mpk::u32 event_stride = 32;
constexpr mpk::u32 sampling_sm = 65;
constexpr mpk::u32 max_queue = 2;  // tasks of one SM in one stage

using Program = mpk::SmProgram<3, 5, 5, 11, 5>;
static_assert(sizeof(Program) == 336, "the host packs programs as the kernel reads them");

__constant__ const mpk::u8 stage_template[num_stages] = {0, 1, 1, 2};
__constant__ const mpk::u8 stage_layer[num_stages] = {0, 1, 2, 2};
__constant__ const mpk::u32 event_total[num_templates][num_events] = {
    {8, 12, 64, 0, 0, 12, 24, 24},  // y.0
    {8, 12, 64, 0, 0, 12, 24, 24},  // y.1
    {0, 0, 0, 65, 1, 0, 0, 0},  // head
};
__constant__ const mpk::WeightRows weight_rows[5] = {
    {0ull, 73728ull, 192, 192, 1},  // qkv
    {221184ull, 49152ull, 512, 512, 1},  // o_add
    {368640ull, 98304ull, 192, 192, 1},  // gate_up
    {663552ull, 49152ull, 512, 512, 1},  // down_add
    {811008ull, 0ull, 192, 192, 1},  // head
};
__constant__ const mpk::CachePages cache_pages[1] = {
    {0ull, 2, 64, 64, 4, 4},  // kv
};

}  // namespace plan

#include "tasks/linear.cuh"
#include "tasks/plain.cuh"
#include "tasks/rmsnorm.cuh"
#include "tasks/embedding.cuh"
#include "tasks/attention_merge.cuh"
#include "tasks/add.cuh"
#include "tasks/gated_act.cuh"
#include "tasks/attention.cuh"
#include "tasks/argmax.cuh"
#include "tasks/rows.cuh"

namespace mpk {

// --- the plan's tasks ---

// y.0: qkv
using qkv_0 = Linear<
    Tiles<96, 384, 96, 1>,
    RmsNorm<EmbeddingRow<910080ull, 96, 1.0f>, Vector<1009408ull, 256ull>, 1e-06f, 0.0f, Published<Turns<254976ull, 96, float, 6144ull, of_step>>>,
    Store<2, Part<Turns<188928ull, 256, bf16, 8192ull, of_layer>, 128, NoVector>,
          Part<Turns<172544ull, 64, bf16, 2048ull, of_layer>, 32, NoVector>,
          Part<Turns<205312ull, 64, bf16, 2048ull, of_layer>, 32, NoVector>>>;

// y.0: attend, y.1: attend
using attend_1 = Attention<
    AttentionShape<8, 2, 32, 4, 64>,
    Turns<188928ull, 256, bf16, 8192ull, of_layer>, Turns<172544ull, 64, bf16, 2048ull, of_layer>, Turns<205312ull, 64, bf16, 2048ull, of_layer>,
    HeadNorms<Vector<1010176ull, 256ull>, Vector<1010944ull, 256ull>, 1e-06f>,
    Rope<0ull, 32>, 0ull,
    Turns<33280ull, 1088, float, 69632ull, of_layer>, 0.1767766952966369f>;

// y.0: o_add
using o_add_2 = Linear<
    Tiles<256, 96, 256, 1>,
    AttentionMerge<Turns<33280ull, 1088, float, 69632ull, of_layer>, 8, 32, 4, 64>,
    AddResidual<Turns<254976ull, 96, float, 6144ull, of_step>, Turns<176640ull, 96, float, 6144ull, of_layer>, NoVector>>;

// y.0: gate_up, y.1: gate_up
using gate_up_3 = Linear<
    Tiles<96, 512, 96, 1>,
    RmsNorm<Row<Turns<176640ull, 96, float, 6144ull, of_layer>>, Vector<1011712ull, 256ull>, 1e-06f, 0.0f, NotPublished>,
    GatedAct<Silu, Turns<209408ull, 256, bf16, 8192ull, of_layer>, NoVector, NoVector>>;

// y.0: down_add, y.1: down_add
using down_add_4 = Linear<
    Tiles<256, 96, 256, 1>,
    Plain<Turns<209408ull, 256, bf16, 8192ull, of_layer>>,
    AddResidual<Turns<176640ull, 96, float, 6144ull, of_layer>, Turns<242688ull, 96, float, 6144ull, of_layer>, NoVector>>;

// y.1: qkv
using qkv_5 = Linear<
    Tiles<96, 384, 96, 1>,
    RmsNorm<Row<Turns<242688ull, 96, float, 6144ull, of_layer_before>>, Vector<1009408ull, 256ull>, 1e-06f, 0.0f, NotPublished>,
    Store<2, Part<Turns<188928ull, 256, bf16, 8192ull, of_layer>, 128, NoVector>,
          Part<Turns<172544ull, 64, bf16, 2048ull, of_layer>, 32, NoVector>,
          Part<Turns<205312ull, 64, bf16, 2048ull, of_layer>, 32, NoVector>>>;

// y.1: o_add
using o_add_6 = Linear<
    Tiles<256, 96, 256, 1>,
    AttentionMerge<Turns<33280ull, 1088, float, 69632ull, of_layer>, 8, 32, 4, 64>,
    AddResidual<Turns<242688ull, 96, float, 6144ull, of_layer_before>, Turns<176640ull, 96, float, 6144ull, of_layer>, NoVector>>;

// head: head
using head_7 = Linear<
    Tiles<96, 515, 96, 1>,
    RmsNorm<Row<Turns<242688ull, 96, float, 6144ull, of_layer>>, Vector<1009152ull, 0ull>, 1e-06f, 0.0f, NotPublished>,
    StoreBest<Tensor<0ull, 515, float>, 515, NoVector, Turns<225792ull, 130, float, 8448ull, of_step>, 515, 0>>;

// head: next_ids
using next_ids_8 = ArgmaxReduce<Turns<225792ull, 130, float, 8448ull, of_step>, Tensor<33024ull, 1, i32>, 65>;

__device__ __forceinline__ void run_task(Progress& progress, u32 run, u32 entry) {
  switch (run) {
    case 0: return run_task_apart<0, qkv_0>(progress, entry);
    case 1: return run_task_as<1, attend_1>(progress, entry);
    case 2: return run_task_apart<2, o_add_2>(progress, entry);
    case 3: return run_task_as<3, gate_up_3>(progress, entry);
    case 4: return run_task_as<4, down_add_4>(progress, entry);
    case 5: return run_task_as<5, qkv_5>(progress, entry);
    case 6: return run_task_as<6, o_add_6>(progress, entry);
    case 7: return run_task_apart<7, head_7>(progress, entry);
    case 8: return run_task_apart<8, next_ids_8>(progress, entry);
  }
}

}  // namespace mpk

#include "runtime/kernel.cuh"
