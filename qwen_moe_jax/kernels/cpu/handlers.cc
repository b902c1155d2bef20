// What XLA calls: arguments checked and handed on.
#include "attention.h"
#include "conv.h"
#include "copy.h"
#include "delta_chunks.h"
#include "delta_step.h"
#include "experts.h"
#include "linear.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ffi = xla::ffi;

// Everything else is hidden: several variants of this library may be loaded at once.
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED XLA_FFI_Error* qwen_moe_jax_rows(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* qwen_moe_jax_linear(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* qwen_moe_jax_experts(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* qwen_moe_jax_conv(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* qwen_moe_jax_delta_step(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* qwen_moe_jax_delta_look(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* qwen_moe_jax_delta_chunks(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* qwen_moe_jax_attention(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* qwen_moe_jax_append(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* qwen_moe_jax_move_states(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* qwen_moe_jax_reserve(XLA_FFI_CallFrame*);

// Whether this library may run here; asks the kernel for the tile registers where it uses them.
EXPORTED int qwen_moe_jax_ready() {
#if defined(__AMX_BF16__)
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return 1;
#endif
}

// Called by the reader of checkpoints, not by XLA; `size` is an element's.
EXPORTED int qwen_moe_jax_copy_finite(char* to, const char* from, long bytes, int size) {
  return copy_finite(to, from, bytes, size == 4 ? Type::F32 : size == 2 ? Type::BF16 : Type::F8);
}

// Of an array of plain numbers.
static bool type_of(const ffi::AnyBuffer& buffer, Type& type) {
  bool wide = buffer.element_type() == ffi::DataType::F32;
  type = wide ? Type::F32 : Type::BF16;
  return wide || buffer.element_type() == ffi::DataType::BF16;
}

static bool scale_type_of(const ffi::AnyBuffer& scales, ScaleType& type) {
  switch (scales.element_type()) {
    case ffi::DataType::F32:
      type = ScaleType::F32;
      return true;
    case ffi::DataType::BF16:
      type = ScaleType::BF16;
      return true;
    case ffi::DataType::F16:
      type = ScaleType::F16;
      return true;
    case ffi::DataType::F8E8M0FNU:
      type = ScaleType::E8M0;
      return true;
    default:
      return false;
  }
}

static ffi::Error wrong(const char* what) {
  return ffi::Error::InvalidArgument(std::string("qwen_moe_jax: ") + what);
}

// How calls.py describes a matrix: codes (0: plain numbers, and else in the order of CODES), rows and columns
// of a block, and whether there are zero points.
using Form = ffi::Span<const int64_t>;
constexpr size_t FORM = 4;  // numbers a matrix

// The last two dimensions of an array are a matrix; scales and zeros are read of codes only.
static bool matrix_of(const ffi::AnyBuffer& w, const ffi::AnyBuffer& scales, const ffi::AnyBuffer& zeros,
                      const int64_t* form, Matrix& matrix) {
  constexpr Type CODES[] = {Type::F8, Type::I8, Type::I4, Type::E2M1};
  auto shape = w.dimensions();
  if (shape.size() < 2 || form[0] < 0 || form[0] > 4) return false;
  matrix.data = w.untyped_data();
  matrix.rows = shape[shape.size() - 2];
  matrix.columns = shape[shape.size() - 1];
  if (form[0] == 0) {
    if (!type_of(w, matrix.type)) return false;
    matrix.stride = matrix.row_bytes();
    return true;
  }
  matrix.type = CODES[form[0] - 1];
  auto held = matrix.type == Type::F8 ? ffi::DataType::F8E4M3FN : ffi::DataType::U8;
  if (w.element_type() != held || form[1] <= 0 || form[2] <= 0) return false;
  matrix.columns *= 8 / bits_of(matrix.type);
  matrix.stride = matrix.row_bytes();
  matrix.block_rows = form[1], matrix.block_columns = form[2];
  // a scale for each block of each matrix, and as many zero points
  auto blocks = scales.dimensions();
  if (!scale_type_of(scales, matrix.scale_type) || blocks.size() != shape.size()) return false;
  for (size_t i = 0; i + 2 < shape.size(); i++)
    if (blocks[i] != shape[i]) return false;
  matrix.scales = scales.untyped_data();
  matrix.scales_down = blocks[blocks.size() - 2];
  if (matrix.scales_down * matrix.block_rows < matrix.rows || blocks.back() != matrix.scales_across())
    return false;
  if (!form[3]) return true;
  matrix.zeros = (const uint8_t*)zeros.untyped_data();
  auto points = zeros.dimensions();
  return (matrix.type == Type::I8 || matrix.type == Type::I4) && zeros.element_type() == ffi::DataType::U8 &&
         points.size() == blocks.size() && std::equal(points.begin(), points.end(), blocks.begin());
}

// Rows of a table, widened; an id outside of it takes the nearest one, as XLA's lookup does.
static ffi::Error Rows(ffi::AnyBuffer table, ffi::Buffer<ffi::S32> ids,
                       ffi::Result<ffi::Buffer<ffi::F32>> out) {
  Matrix matrix;
  constexpr int64_t plain[FORM] = {};
  if (!matrix_of(table, table, table, plain, matrix)) return wrong("rows: the table");
  for (size_t i = 0; i < ids.element_count(); i++) {
    long row = std::clamp((long)ids.typed_data()[i], 0L, matrix.rows - 1);
    widen(matrix, row, 0, matrix.columns, matrix.columns, out->typed_data() + i * matrix.columns);
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    qwen_moe_jax_rows, Rows,
    ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::Buffer<ffi::F32>>());

// Matrices, their scales and zero points in turns; for each one a result, and a form.
static ffi::Error Linear(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::RemainingArgs matrices,
                         ffi::RemainingRets results, Form forms) {
  Type x_type;
  if (!type_of(x, x_type)) return wrong("linear: x is float32 or bfloat16");
  if (matrices.size() != 3 * results.size() || forms.size() != FORM * results.size() || results.size() == 0)
    return wrong("linear: a result, scales, zero points and a form for each matrix");
  std::vector<Product> products;
  for (size_t i = 0; i < results.size(); i++) {
    auto w = matrices.get<ffi::AnyBuffer>(3 * i), scales = matrices.get<ffi::AnyBuffer>(3 * i + 1),
         zeros = matrices.get<ffi::AnyBuffer>(3 * i + 2);
    auto out = results.get<ffi::AnyBuffer>(i);
    if (!w || !scales || !zeros || !out) return wrong("linear: arguments");
    Product product;
    if (!matrix_of(*w, *scales, *zeros, forms.begin() + FORM * i, product.w))
      return wrong("linear: a matrix");
    if (x.dimensions().back() != product.w.columns) return wrong("linear: x and a matrix do not fit");
    if (!type_of(**out, product.type)) return wrong("linear: dtype of a result");
    product.out = (char*)(*out)->untyped_data();
    products.push_back(product);
  }
  Pool pool(threads);
  long depth = products[0].w.columns, tokens = depth ? x.element_count() / depth : 0;
  if (tokens) linear(pool, (const char*)x.untyped_data(), x_type, tokens, products);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    qwen_moe_jax_linear, Linear,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().RemainingArgs().RemainingRets().Attr<Form>(
        "forms"));

// Scales, zero points and forms as of Linear.
static ffi::Error ExpertLayer(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> ids,
                              ffi::Buffer<ffi::F32> weights, ffi::AnyBuffer gate_up, ffi::AnyBuffer up_scales,
                              ffi::AnyBuffer up_zeros, ffi::AnyBuffer down, ffi::AnyBuffer down_scales,
                              ffi::AnyBuffer down_zeros, ffi::Result<ffi::Buffer<ffi::F32>> out, Form forms,
                              bool by_slot) {
  Experts e;
  if (!type_of(x, e.type)) return wrong("experts: x is float32 or bfloat16");
  if (forms.size() != 2 * FORM || !matrix_of(gate_up, up_scales, up_zeros, forms.begin(), e.gate_up) ||
      !matrix_of(down, down_scales, down_zeros, forms.begin() + FORM, e.down))
    return wrong("experts: matrices");
  e.x = (const char*)x.untyped_data();
  e.ids = ids.typed_data();
  e.weights = weights.typed_data();
  e.tokens = x.dimensions()[0];
  e.slots = ids.dimensions()[1];
  e.count = gate_up.dimensions()[0];
  e.by_slot = by_slot;
  e.out = out->typed_data();
  if (x.dimensions()[1] != e.gate_up.columns || e.gate_up.rows != 2 * e.down.columns ||
      e.down.rows != e.gate_up.columns || down.dimensions()[0] != e.count || ids.dimensions()[0] != e.tokens)
    return wrong("experts: shapes");
  Pool pool(threads);
  run_experts(pool, e);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwen_moe_jax_experts, ExpertLayer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<Form>("forms")
                                  .Attr<bool>("by_slot"));

using Float32s = ffi::Buffer<ffi::F32>;

// A pool changes where it lies: XLA lets the result share its memory with the argument, as it is told to.
template <class Buffer>
static void keep_pool(const Buffer& before, Buffer& after) {
  if (after.untyped_data() != before.untyped_data())
    memcpy(after.untyped_data(), before.untyped_data(), before.size_bytes());
}

static ffi::Error Conv(ffi::ThreadPool threads, ffi::AnyBuffer x, Float32s weight, ffi::AnyBuffer carried,
                       ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> counts, ffi::Result<Float32s> query,
                       ffi::Result<Float32s> key, ffi::Result<Float32s> value,
                       ffi::Result<ffi::AnyBuffer> new_carried) {
  Type type;
  if (!type_of(x, type) || carried.element_type() != x.element_type())
    return wrong("conv: inputs are float32 or bfloat16");
  auto keys = key->dimensions(), values = value->dimensions(), taps = weight.dimensions();
  if (keys.size() != 4 || values.size() != 4 || taps.size() != 2 ||
      2 * keys[2] * keys[3] + values[2] * values[3] != taps[1] || x.dimensions().back() != taps[1])
    return wrong("conv: shapes");
  for (int count : ffi::Span<const int>(counts.typed_data(), counts.element_count()))
    if (count < 0 || count > keys[1]) return wrong("conv: a row has as many tokens as it is long at most");
  auto pool_of = carried.dimensions();
  if (pool_of.size() != 3 || pool_of[1] != taps[0] - 1 || pool_of[2] != taps[1] ||
      slots.element_count() != (size_t)keys[0])
    return wrong("conv: carried inputs");
  keep_pool(carried, *new_carried);
  Pool pool(threads);
  conv_heads(pool, {keys[0], keys[1], keys[2], values[2], keys[3], values[3], taps[0], pool_of[0], type,
                    (const char*)x.untyped_data(), weight.typed_data(), (char*)new_carried->untyped_data(),
                    slots.typed_data(), counts.typed_data(), query->typed_data(), key->typed_data(),
                    value->typed_data()});
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwen_moe_jax_conv, Conv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Float32s>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<Float32s>()
                                  .Ret<Float32s>()
                                  .Ret<Float32s>()
                                  .Ret<ffi::AnyBuffer>());

// Query, key, value, g, beta, the pool of states and a slot a row.
static auto tokens_and_states() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Float32s>()
      .Arg<Float32s>()
      .Arg<Float32s>()
      .Arg<Float32s>()
      .Arg<Float32s>()
      .Arg<Float32s>()
      .Arg<ffi::Buffer<ffi::S32>>();
}

// To the output and the pool after it.
static auto recurrence() { return tokens_and_states().Ret<Float32s>().Ret<Float32s>(); }

// `state` is that of the pool to change, or, to look only, of the pool itself.
static ffi::Error delta_tokens(ffi::ThreadPool threads, Float32s query, Float32s key, Float32s value,
                               Float32s g, Float32s beta, Float32s state, ffi::Buffer<ffi::S32> slots,
                               float* pool_data, bool keep, float* out) {
  auto shape = state.dimensions(), keys = key.dimensions();
  if (shape.size() != 4 || keys.size() != 4 || shape[1] % keys[2] || slots.element_count() != (size_t)keys[0])
    return wrong("delta_step: shapes");
  Pool pool(threads);
  delta_step(pool, {keys[0], keys[1], shape[0], shape[1], keys[2], shape[2], shape[3], keep, pool_data,
                    slots.typed_data(), query.typed_data(), key.typed_data(), value.typed_data(),
                    g.typed_data(), beta.typed_data(), out});
  return ffi::Error::Success();
}

static ffi::Error DeltaStep(ffi::ThreadPool threads, Float32s query, Float32s key, Float32s value, Float32s g,
                            Float32s beta, Float32s state, ffi::Buffer<ffi::S32> slots,
                            ffi::Result<Float32s> out, ffi::Result<Float32s> new_state) {
  keep_pool(state, *new_state);
  return delta_tokens(threads, query, key, value, g, beta, state, slots, new_state->typed_data(), false,
                      out->typed_data());
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwen_moe_jax_delta_step, DeltaStep, recurrence());

// What the tokens read, without a trace of them.
static ffi::Error DeltaLook(ffi::ThreadPool threads, Float32s query, Float32s key, Float32s value, Float32s g,
                            Float32s beta, Float32s state, ffi::Buffer<ffi::S32> slots,
                            ffi::Result<Float32s> out) {
  return delta_tokens(threads, query, key, value, g, beta, state, slots, state.typed_data(), true,
                      out->typed_data());
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwen_moe_jax_delta_look, DeltaLook, tokens_and_states().Ret<Float32s>());

static ffi::Error DeltaChunks(ffi::ThreadPool threads, Float32s query, Float32s key, Float32s value,
                              Float32s g, Float32s beta, Float32s state, ffi::Buffer<ffi::S32> slots,
                              ffi::Result<Float32s> out, ffi::Result<Float32s> new_state) {
  auto keys = key.dimensions(), values = value.dimensions(), shape = state.dimensions();
  if (keys.size() != 4 || values.size() != 4 || values[2] % keys[2] || shape.size() != 4 ||
      slots.element_count() != (size_t)keys[0])
    return wrong("delta_chunks: shapes");
  keep_pool(state, *new_state);
  Pool pool(threads);
  delta_chunks(pool, {values[0], values[1], shape[0], values[2], keys[2], keys[3], values[3],
                      query.typed_data(), key.typed_data(), value.typed_data(), g.typed_data(),
                      beta.typed_data(), new_state->typed_data(), slots.typed_data(), out->typed_data()});
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwen_moe_jax_delta_chunks, DeltaChunks, recurrence());

static ffi::Error Attend(ffi::ThreadPool threads, ffi::AnyBuffer query, ffi::AnyBuffer key,
                         ffi::AnyBuffer value, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> places,
                         ffi::Buffer<ffi::S32> tables, ffi::AnyBuffer k, ffi::AnyBuffer v,
                         ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> new_k,
                         ffi::Result<ffi::AnyBuffer> new_v) {
  Attention a;
  auto shape = query.dimensions(), cache = k.dimensions();
  Type key_type, value_type;
  if (!type_of(query, a.type) || !type_of(k, a.cache_type))
    return wrong("attention: queries and cache are float32 or bfloat16");
  if (!type_of(key, key_type) || !type_of(value, value_type) || key_type != a.type || value_type != a.type ||
      v.element_type() != k.element_type())
    return wrong("attention: keys and values are of the queries' dtype, and both caches of one");
  auto table = tables.dimensions();
  if (shape.size() != 4 || cache.size() != 4 || shape[2] % cache[2] || shape[3] != cache[3] ||
      table.size() != 2 || table[0] != shape[0])
    return wrong("attention: shapes");
  if (cache[1] % PANEL) return wrong("attention: a page holds a multiple of 32 tokens");
  if (shape[2] / cache[2] > QUERIES) return wrong("attention: more query heads a key head than a task takes");
  a.batch = shape[0], a.seq = shape[1], a.heads = shape[2], a.dim = shape[3];
  a.pages = cache[0], a.page = cache[1], a.kv_heads = cache[2], a.width = table[1];
  a.query = (const char*)query.untyped_data();
  a.positions = positions.typed_data();
  a.tables = tables.typed_data();
  a.count_pages();
  a.out = (char*)out->untyped_data();
  a.k = (char*)new_k->untyped_data();
  a.v = (char*)new_v->untyped_data();
  keep_pool(k, *new_k);
  keep_pool(v, *new_v);
  append_keys(a, (const char*)key.untyped_data(), (const char*)value.untyped_data(), places.typed_data());
  Pool pool(threads);
  attend(pool, a);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwen_moe_jax_attention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

// New keys and values to their rows' pages, without a query.
static ffi::Error Append(ffi::AnyBuffer key, ffi::AnyBuffer value, ffi::Buffer<ffi::S32> places,
                         ffi::Buffer<ffi::S32> tables, ffi::AnyBuffer k, ffi::AnyBuffer v,
                         ffi::Result<ffi::AnyBuffer> new_k, ffi::Result<ffi::AnyBuffer> new_v) {
  Attention a;
  auto shape = key.dimensions(), cache = k.dimensions(), table = tables.dimensions();
  Type value_type;
  if (!type_of(key, a.type) || !type_of(k, a.cache_type) || !type_of(value, value_type) ||
      value_type != a.type || v.element_type() != k.element_type())
    return wrong("append: keys, values and cache are float32 or bfloat16, and both of one dtype");
  if (shape.size() != 4 || cache.size() != 4 || shape[2] != cache[2] || shape[3] != cache[3] ||
      table.size() != 2 || table[0] != shape[0])
    return wrong("append: shapes");
  a.batch = shape[0], a.seq = shape[1], a.dim = shape[3];
  a.pages = cache[0], a.page = cache[1], a.kv_heads = cache[2], a.width = table[1];
  a.tables = tables.typed_data();
  a.count_pages();
  a.k = (char*)new_k->untyped_data();
  a.v = (char*)new_v->untyped_data();
  keep_pool(k, *new_k);
  keep_pool(v, *new_v);
  append_keys(a, (const char*)key.untyped_data(), (const char*)value.untyped_data(), places.typed_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwen_moe_jax_append, Append,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

// Pools, and as many others that their entries come from; zeros for an entry that these have not.
static ffi::Error MoveStates(ffi::Buffer<ffi::S32> places, ffi::Buffer<ffi::S32> sources,
                             ffi::RemainingArgs pools, ffi::RemainingRets results) {
  if (pools.size() != 2 * results.size() || places.element_count() != sources.element_count())
    return wrong("move_states: another pool and a result for each pool, and a source for each place");
  for (size_t i = 0; i < results.size(); i++) {
    auto before = pools.get<ffi::AnyBuffer>(i), other = pools.get<ffi::AnyBuffer>(results.size() + i);
    auto pool = results.get<ffi::AnyBuffer>(i);
    if (!before || !other || !pool) return wrong("move_states: arguments");
    auto shape = before->dimensions(), from = other->dimensions();
    if (before->element_type() != other->element_type() || shape.size() != from.size() || shape.size() == 0 ||
        !std::equal(shape.begin() + 1, shape.end(), from.begin() + 1))
      return wrong("move_states: entries of two pools are not alike");
    keep_pool(*before, **pool);
    if (!shape[0]) continue;
    long entry = before->size_bytes() / shape[0];
    char* to = (char*)(*pool)->untyped_data();
    for (size_t move = 0; move < places.element_count(); move++) {
      long place = places.typed_data()[move], source = sources.typed_data()[move];
      if (place < 0 || place >= shape[0]) continue;
      if (source >= 0 && source < from[0])
        memcpy(to + place * entry, (const char*)other->untyped_data() + source * entry, entry);
      else
        memset(to + place * entry, 0, entry);
    }
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwen_moe_jax_move_states, MoveStates,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets());

// Memory that is not written: the machine hands out a large array's as it is touched.
static ffi::Error Reserve(ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwen_moe_jax_reserve, Reserve, ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());
