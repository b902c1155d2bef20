// The routed experts of a layer: slots sorted by expert, each group through its expert's two products.
#pragma once
#include "linear.h"

struct Experts {
  const char* x;  // [tokens, hidden] of `type`
  Type type;
  const int* ids;        // [tokens, slots], `count` meaning none
  const float* weights;  // [tokens, slots]
  long tokens, slots, count;
  Matrix gate_up, down;  // of expert 0; the others follow, [2 * inner, hidden] and [hidden, inner]
  bool by_slot;
  float* out;  // [tokens, hidden], or [tokens, slots, hidden]
};

// Slots of one expert that are computed together.
struct Group {
  long expert, first, count;  // the slots are order[first .. first + count)
  size_t inner;               // where their hidden activations begin, in bytes
};

inline Matrix expert_of(const Matrix& stack, long e) {
  Matrix one = stack;
  one.data = stack.row(e * stack.rows);
  long scales = e * stack.scales_down * stack.scales_across();
  if (stack.scales) one.scales = (const char*)stack.scales + scales * scale_size(stack.scale_type);
  if (stack.zeros) one.zeros = stack.zeros + scales;
  return one;
}

// Slots that have an expert, sorted by it and within one by token.
inline std::vector<int> sort_slots(const Experts& e, std::vector<Group>& found) {
  long all = e.tokens * e.slots;
  std::vector<long> begin(e.count + 1, 0);
  for (long s = 0; s < all; s++)
    if (e.ids[s] >= 0 && e.ids[s] < e.count) begin[e.ids[s] + 1]++;
  for (long i = 0; i < e.count; i++) begin[i + 1] += begin[i];
  std::vector<int> order(begin[e.count]);
  std::vector<long> next(begin.begin(), begin.end() - 1);
  for (long s = 0; s < all; s++)
    if (e.ids[s] >= 0 && e.ids[s] < e.count) order[next[e.ids[s]]++] = (int)s;
  // a group is no larger than a panel's tokens, and small enough that a few threads share the largest
  constexpr long MOST = 128;
  size_t inner = 0;
  for (long i = 0; i < e.count; i++)
    for (long s = begin[i]; s < begin[i + 1]; s += MOST) {
      Group group{i, s, std::min(MOST, begin[i + 1] - s), inner};
      inner += round_up(operand_bytes(group.count, e.down, e.type), 64);
      found.push_back(group);
    }
  return order;
}

// silu(gate) * up, each rounded where the model's dtype rounds; `count` a multiple of LANES, in place of
// gate.
inline void activate(float* gate, const float* up, long count, Type type) {
  for (long i = 0; i < count; i += LANES) {
    Floats g = rounded(load<Floats>(gate + i), type), u = rounded(load<Floats>(up + i), type);
    store(gate + i, rounded(rounded(silu(g), type) * u, type));
  }
}

// Most bytes of experts that a thread takes at once: most experts whole, whose tokens are then packed once.
constexpr long EXPERT_RUN = 4 << 20;

inline void run_experts(Pool& pool, const Experts& e) {
  std::vector<Group> found;
  std::vector<int> order = sort_slots(e, found);
  long inner = e.down.columns, hidden = e.down.rows, all = (long)order.size(), size = size_of(e.type);
  std::vector<int> rows(all);  // of x
  for (long s = 0; s < all; s++) rows[s] = (int)(order[s] / e.slots);
  size_t inner_bytes = 64;
  if (!found.empty()) {
    const Group& last = found.back();
    inner_bytes += last.inner + operand_bytes(last.count, e.down, e.type);
  }
  Workspace inner_memory(inner_bytes), slot_memory(all * hidden * size + 64);
  char* slot_outputs = slot_memory.as<char>();  // [sorted slot, hidden], rounded
  auto inner_of = [&](const Group& g) {
    return operand(g.count, e.down, e.type, inner_memory.as<char>() + g.inner);
  };
  long groups_found = (long)found.size();
  // work(group, begin, end) for the panels of a run, group by group
  auto by_group = [&](long panels, auto work) {
    return [=, &found](long begin, long end) {
      Tiles tiles;
      by_stretch(begin, end, panels, [&](long g, long first, long last) { work(found[g], first, last); });
    };
  };

  long up_panels = (inner + PANEL - 1) / PANEL;
  std::vector<std::atomic<long>> left(found.size());  // panels of each group
  for (auto& panels : left) panels = up_panels;
  auto up_product = [&](const Group& g, long begin, long end) {
    PanelScratch& scratch = PanelScratch::mine();
    Matrix gate_up = expert_of(e.gate_up, g.expert);
    Operand x = operand(g.count, gate_up, e.type, thread_memory(operand_bytes(g.count, gate_up, e.type)));
    for (long t = 0; t < g.count; t += Operand::group(x.way)) pack_group(x, e.x, e.type, &rows[g.first], t);
    Operand to = inner_of(g);
    long ldc = x.pitch();
    float *gate = scratch.c[0], *up = scratch.c[1];
    Matrix gates = gate_up, ups = gate_up;
    gates.rows = std::min(inner, end * PANEL), ups.rows = inner + gates.rows;
    fetch_beginning(gates, begin * PANEL, x.way);
    fetch_beginning(ups, inner + begin * PANEL, x.way);
    // as many panels of either half in a row as there is room for
    long at_once = PanelScratch::rows(ldc), stop = gates.rows;
    for (long first = begin * PANEL; first < stop; first += at_once) {
      long count = std::min(at_once, stop - first);
      multiply_panels(gates, first, count, x, gate, ldc);
      multiply_panels(ups, inner + first, count, x, up, ldc);
      activate(gate, up, round_up(count * ldc, LANES), e.type);
      for (long r = 0; r < count; r += 2)
        put_pair(to, first + r, gate + r * ldc, r + 1 < count ? gate + (r + 1) * ldc : nullptr);
    }
    // whoever computed the last panels finishes what the second product reads
    std::atomic<long>& missing = left[&g - found.data()];
    if (missing.fetch_sub(end - begin, std::memory_order_acq_rel) == end - begin) finish(to);
  };
  pool.run_ranges(groups_found * up_panels, std::max(1L, EXPERT_RUN / (2 * PANEL * e.gate_up.stride)),
                  by_group(up_panels, up_product));

  long down_panels = (hidden + PANEL - 1) / PANEL;
  auto down_product = [&](const Group& g, long begin, long end) {
    PanelScratch& scratch = PanelScratch::mine();
    Matrix down = expert_of(e.down, g.expert);
    Operand x = inner_of(g);
    long ldc = x.pitch();
    long at_once = PanelScratch::rows(ldc), stop = std::min(hidden, end * PANEL);
    down.rows = stop;
    fetch_beginning(down, begin * PANEL, x.way);
    for (long first = begin * PANEL; first < stop; first += at_once) {
      long count = std::min(at_once, stop - first);
      multiply_panels(down, first, count, x, scratch.c[0], ldc);
      for (long r = 0; r < count; r += PANEL)
        write_panel(scratch.c[0] + r * ldc, ldc, g.count, std::min(PANEL, count - r), scratch.c[1], e.type,
                    slot_outputs + (g.first * hidden + first + r) * size, hidden * size);
    }
  };
  pool.run_ranges(groups_found * down_panels, std::max(1L, EXPERT_RUN / (PANEL * e.down.stride)),
                  by_group(down_panels, down_product));

  // every token's slots, in their order
  std::vector<int> place(e.tokens * e.slots, -1);
  for (long s = 0; s < all; s++) place[order[s]] = (int)s;
  long at_once = std::max(1L, 65536 / (e.slots * hidden));
  pool.run((e.tokens + at_once - 1) / at_once, [&](long task) {
    for (long t = task * at_once; t < std::min(e.tokens, (task + 1) * at_once); t++) {
      float* out = e.out + t * hidden * (e.by_slot ? e.slots : 1);
      memset(out, 0, 4 * hidden * (e.by_slot ? e.slots : 1));
      for (long s = 0; s < e.slots; s++) {
        long slot = place[t * e.slots + s];
        float weight = e.weights[t * e.slots + s];
        float* to = out + (e.by_slot ? s * hidden : 0);
        if (slot < 0) continue;
        const char* from = slot_outputs + slot * hidden * size;
        if (e.type == Type::F32)
          for (long i = 0; i < hidden; i++) to[i] += weight * ((const float*)from)[i];
        else
          for (long i = 0; i < hidden; i++) to[i] += weight * from_bf16(((const uint16_t*)from)[i]);
      }
    }
  });
}
