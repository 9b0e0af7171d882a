// qwen3-tiny for NVIDIA H100 80GB SXM sm_90a, plan c6ed6f25e0c48635: generated, do not edit.
// 4 stages, 8 kinds of task, 132 blocks, one per SM.
#define MPK_RANKS 2
#include "runtime/program.cuh"

namespace plan {

constexpr mpk::u32 shared_limit = 232448;
constexpr mpk::u32 ring_slots = 54;
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
constexpr mpk::u32 num_events = 7;
constexpr mpk::u32 event_stride = 32;
constexpr mpk::u32 sampling_sm = 33;
constexpr mpk::u32 max_queue = 1;  // tasks of one SM in one stage

using Program = mpk::SmProgram<3, 3, 3, 9, 3>;
static_assert(sizeof(Program) == 228, "the host packs programs as the kernel reads them");

__constant__ const mpk::u8 stage_template[num_stages] = {0, 1, 1, 2};
__constant__ const mpk::u8 stage_layer[num_stages] = {0, 1, 2, 2};
__constant__ const mpk::u32 event_total[num_templates][num_events] = {
    {4, 24, 32, 0, 0, 24, 24},  // y.0
    {4, 24, 32, 0, 0, 24, 24},  // y.1
    {0, 0, 0, 66, 1, 0, 0},  // head
};
__constant__ const mpk::u8 event_from_peers[num_events] = {0, 1, 0, 1, 0, 1, 0};
__device__ __forceinline__ bool from_peers(mpk::u32 event) { return event_from_peers[event] != 0; }
__constant__ const mpk::WeightRows weight_rows[5] = {
    {0ull, 36864ull, 192, 192, 1},  // qkv
    {110592ull, 24576ull, 256, 256, 1},  // o_add
    {184320ull, 49152ull, 192, 192, 1},  // gate_up
    {331776ull, 24576ull, 256, 256, 1},  // down_add
    {405504ull, 0ull, 192, 192, 1},  // head
};
__constant__ const mpk::CachePages cache_pages[1] = {
    {0ull, 1, 64, 64, 4, 4},  // kv
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
#include "tasks/inbox.cuh"
#include "tasks/all_reduce.cuh"

namespace mpk {

// --- the plan's tasks ---

// y.0: qkv
using qkv_0 = Linear<
    Tiles<96, 192, 96, 1>,
    RmsNorm<EmbeddingRow<455168ull, 96, 1.0f>, Vector<554496ull, 256ull>, 1e-06f, 0.0f, Published<Turns<119296ull, 96, float, 6144ull, of_layer>>>,
    Store<1, Part<Turns<100864ull, 128, bf16, 4096ull, of_layer>, 128, NoVector>,
          Part<Turns<86528ull, 32, bf16, 1024ull, of_layer>, 32, NoVector>,
          Part<Turns<109056ull, 32, bf16, 1024ull, of_layer>, 32, NoVector>>>;

// y.0: attend, y.1: attend
using attend_1 = Attention<
    AttentionShape<4, 1, 32, 4, 64>,
    Turns<100864ull, 128, bf16, 4096ull, of_layer>, Turns<86528ull, 32, bf16, 1024ull, of_layer>, Turns<109056ull, 32, bf16, 1024ull, of_layer>,
    HeadNorms<Vector<555264ull, 256ull>, Vector<556032ull, 256ull>, 1e-06f>,
    Rope<0ull, 32>, 0ull,
    Turns<16896ull, 544, float, 34816ull, of_layer>, 0.1767766952966369f>;

// y.0: o_add, y.1: o_add
using o_add_2 = Linear<
    Tiles<128, 96, 128, 1>,
    AttentionMerge<Turns<16896ull, 544, float, 34816ull, of_layer>, 4, 32, 4, 64>,
    Store<1, Part<Inbox<0ull, 96, 6144ull, 12288ull, of_layer>, 96, NoVector>>>;

// y.0: gate_up, y.1: gate_up
using gate_up_3 = Linear<
    Tiles<96, 256, 96, 1>,
    RmsNorm<SumRow<Turns<119296ull, 96, float, 6144ull, of_layer>, Inbox<0ull, 96, 6144ull, 12288ull, of_layer>>, Vector<556800ull, 256ull>, 1e-06f, 0.0f, Published<Turns<88576ull, 96, float, 6144ull, of_layer>>>,
    GatedAct<Silu, Turns<111104ull, 128, bf16, 4096ull, of_layer>, NoVector, NoVector>>;

// y.0: down_add, y.1: down_add
using down_add_4 = Linear<
    Tiles<128, 96, 128, 1>,
    Plain<Turns<111104ull, 128, bf16, 4096ull, of_layer>>,
    Store<1, Part<Inbox<24576ull, 96, 6144ull, 12288ull, of_layer>, 96, NoVector>>>;

// y.1: qkv
using qkv_5 = Linear<
    Tiles<96, 192, 96, 1>,
    RmsNorm<SumRow<Turns<88576ull, 96, float, 6144ull, of_layer_before>, Inbox<24576ull, 96, 6144ull, 12288ull, of_layer_before>>, Vector<554496ull, 256ull>, 1e-06f, 0.0f, Published<Turns<119296ull, 96, float, 6144ull, of_layer>>>,
    Store<1, Part<Turns<100864ull, 128, bf16, 4096ull, of_layer>, 128, NoVector>,
          Part<Turns<86528ull, 32, bf16, 1024ull, of_layer>, 32, NoVector>,
          Part<Turns<109056ull, 32, bf16, 1024ull, of_layer>, 32, NoVector>>>;

// head: head
using head_6 = Linear<
    Tiles<96, 258, 96, 1>,
    RmsNorm<SumRow<Turns<88576ull, 96, float, 6144ull, of_layer>, Inbox<24576ull, 96, 6144ull, 12288ull, of_layer>>, Vector<554240ull, 0ull>, 1e-06f, 0.0f, NotPublished>,
    StoreBest<Tensor<0ull, 258, float>, 258, NoVector, Inbox<49152ull, 66, 4352ull, 8704ull, of_step>, 515, 258>>;

// head: next_ids
using next_ids_7 = ArgmaxReduce<Inbox<49152ull, 66, 4352ull, 8704ull, of_step>, Tensor<16640ull, 1, i32>, 33>;

__device__ __forceinline__ void run_task(Progress& progress, u32 run, u32 entry) {
  switch (run) {
    case 0: return run_task_apart<0, qkv_0>(progress, entry);
    case 1: return run_task_as<1, attend_1>(progress, entry);
    case 2: return run_task_as<2, o_add_2>(progress, entry);
    case 3: return run_task_as<3, gate_up_3>(progress, entry);
    case 4: return run_task_as<4, down_add_4>(progress, entry);
    case 5: return run_task_as<5, qkv_5>(progress, entry);
    case 6: return run_task_apart<6, head_6>(progress, entry);
    case 7: return run_task_apart<7, next_ids_7>(progress, entry);
  }
}

}  // namespace mpk

#include "runtime/kernel.cuh"
