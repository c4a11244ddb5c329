// One forward pass over a few tokens, as fast as the memory that holds the weights.
//
// The forward pass of nanollm/model written once more, for CPUs, without autograd. All tokens of a pass, whatever their
// row and position, go through each matrix together, so that a weight is fetched once. Every sum has an order of its
// own that depends on nothing else in the pass: a row's answer is the same, bit for bit, in any company.
//
// A matrix lies in panels of 32 outputs: [panel][input / 2][32][2] for bfloat16 and int8, [panel][input][32] for
// float32, [panel][input / 32] groups for int4; a thread reads its panels from the first byte to the last. Activations
// between matrices are rounded to the weights' type (bfloat16 for int8 and int4), sums and the residual stream stay
// float32.
// A token may have an adapter (LoRA, arXiv:2106.09685): then y = W x + B (A x), with a B that has its scale within.
// Letters as in the model: D width, H heads, Q query latent, C key-value latent, N width without position, R rotary
// width, V value width, S slots. T is the type of activations and cache: float or bf16.

#include <new>
#include <vector>
#include <omp.h>
#include "vectors.h"

namespace {

constexpr int QUERIES = 24;  // of one head and one prompt that attend together

// An adapter's part of a matrix. Of a stack of heads, A or B may be one for all: its step is 0.
struct Pair {
    const void *a, *b;       // panels of (rank, inputs) and of (outputs, rank), in T; null: none
    int64_t rank;            // even
    int64_t a_step, b_step;  // numbers from a head's to the next one's
};

struct Matrix {
    const void* panels;
    const float* scales;  // of each output, for int8; null: none
    int64_t outputs, inputs, is_int4;
    const Pair* pairs;  // of each adapter; null: no adapter has one
    int count() const { return int((outputs + PANEL - 1) / PANEL); }
};

// What a thread needs for itself.
template <class T> struct Scratch {
    std::vector<T> panel;        // an unpacked panel
    std::vector<float> out;      // (rows, 32)
    std::vector<float> group;    // (rows, 32) of a group of int4
    std::vector<float> gate;     // the same for a second product
    std::vector<float> scores;   // (heads of a group or queries of a tile, S)
    std::vector<T> shares;       // the same, softened
    std::vector<int> members;    // tokens of an expert
    std::vector<float> added;    // (rows, 32) by an adapter
    std::vector<int64_t> whose;  // adapters of rows
};

// The same as `product`, for int4: the sums of each group, times its scales, one group after another.
void product_int4(const bf16* a, int64_t stride, int rows, const Matrix& w, int panel, Scratch<bf16>& own, float* out) {
    const Group* group = (const Group*)w.panels + panel * w.inputs / SHARE;
    float* sums = own.group.data();
    std::fill_n(out, rows * PANEL, 0.0f);
    for (int k = 0; k < w.inputs; k += SHARE, group++) {
        if (rows == 1) {
            tile<1>(a + k, stride, group->numbers, SHARE, sums);
        } else if (rows <= 2 * TALL) {
            tiles(a + k, stride, rows, group->numbers, SHARE, sums);
        } else {  // unpacked once for all tiles
            for (int i = 0; i < SHARE / 2; i++) {
                auto* two = (u32x16*)&own.panel[i * 2 * PANEL];
                pairs(group->numbers + i * PANEL, two[0], two[1]);
            }
            tiles(a + k, stride, rows, own.panel.data(), SHARE, sums);
        }
        f32x16 low = load_f16(group->scales), high = load_f16(group->scales + 16);
        for (int row = 0; row < rows; row++) {
            auto *total = (f32x16*)(out + row * PANEL), *more = (f32x16*)(sums + row * PANEL);
            total[0] += low * more[0];
            total[1] += high * more[1];
        }
    }
}

// out (rows, 32) = a times panel number `panel` of w.
template <class T>
void product(const T* a, int64_t stride, int rows, const Matrix& w, int panel, Scratch<T>& own, float* out) {
    int inputs = int(w.inputs);
    if constexpr (sizeof(T) == 2)
        if (w.is_int4) return product_int4(a, stride, rows, w, panel, own, out);
    int64_t start = int64_t(panel) * PANEL * inputs;
    if (!w.scales) return tiles(a, stride, rows, (const T*)w.panels + start, inputs, out);
    if constexpr (sizeof(T) == 2) {
        const int8_t* bytes = (const int8_t*)w.panels + start;
        if (rows <= 2 * TALL) {
            tiles(a, stride, rows, bytes, inputs, out);
        } else {  // unpacked once for all tiles
            for (int i = 0; i < PANEL * inputs; i += 32) *(u32x16*)&own.panel[i] = pairs(bytes + i);
            tiles(a, stride, rows, own.panel.data(), inputs, out);
        }
        const float* scales = w.scales + panel * PANEL;
        for (int row = 0; row < rows; row++)
            for (int j = 0; j < PANEL; j++) out[row * PANEL + j] *= scales[j];
    }
}

// --- the model ---

struct Block {
    const float *attention_norm, *q_norm, *kv_norm, *ffn_norm;
    Matrix low;             // D -> Q + C + R
    Matrix q_up;            // Q -> H * (N + R)
    Matrix key_up;          // per head N -> C, heads one after another: W_uk moved into the query
    Matrix key_down;        // per head C -> N: W_uk itself
    Matrix value_up;        // per head C -> V
    Matrix out;             // H * V -> D
    Matrix gate, up, down;  // dense, or the shared experts
    int64_t is_moe;
    const float *centroids, *balance_bias;  // (E, D), (E,)
    const Matrix* experts;                  // gate, up, down of each
};

struct Model {
    int64_t d_model, n_blocks, n_heads, q_rank, kv_rank, nope, rope, value, widest, n_experts, top_k, vocab;
    int64_t rows, slots, max_tokens, rank, normalise;  // rank: the greatest of a pair, a multiple of 32
    float eps, scale, routed_scale;
    const void* embed;           // (vocab, D)
    const float *cosine, *sine;  // (slots, R / 2)
    const float* norm;
    Matrix head;
    const Block* blocks;
    void* cache;  // (L, rows, slots, C + R)
    int64_t head_dim() const { return nope + rope; }
    int64_t width() const { return kv_rank + rope; }
};

struct Pass {
    int64_t count;                             // tokens
    const int64_t *tokens, *rows, *positions;  // (count,)
    const int64_t* adapters;                   // (count,): -1: none; null: none of any token
    int64_t pieces;            // of prompts; they come first, then single tokens of rows that are replying
    const int64_t* lengths;    // (pieces,)
    int64_t wanted;            // logits
    const int64_t* wanted_at;  // (wanted,): which tokens
    float* logits;             // (wanted, vocab)
    int64_t* experts;          // (count, MoE blocks, top_k)
    int64_t threads;
};

template <class T> struct Buffers {
    std::vector<float> x, low, q_float, weights;
    std::vector<T> h, q_latent, q, q_absorbed, mixed, values, act, gathered;
    std::vector<T> keys, expanded;  // of one piece: panels per head
    std::vector<T> shrunk[2];       // A x, of two matrices in turn
    std::vector<int64_t> chosen;
};

template <class T> void rms_norm(const float* x, const float* weight, int width, float eps, T* y) {
    f32x16 total = {};
    int i = 0;
    for (; i + 16 <= width; i += 16) total += load(x + i) * load(x + i);
    float squares = sum(total);
    for (; i < width; i++) squares += x[i] * x[i];
    float factor = 1.0f / std::sqrt(squares / width + eps);
    for (i = 0; i < width; i++) narrow(x[i] * factor * weight[i], y[i]);
}

template <class T> void rotate(const float* x, const float* cosine, const float* sine, int width, T* y) {
    for (int i = 0; i < width / 2; i++) {
        narrow(x[2 * i] * cosine[i] - x[2 * i + 1] * sine[i], y[2 * i]);
        narrow(x[2 * i + 1] * cosine[i] + x[2 * i] * sine[i], y[2 * i + 1]);
    }
}

template <class T> float dot(const T* a, const T* b, int width) {
    f32x16 total = {};
    int i = 0;
    for (; i + 16 <= width; i += 16) total += load(a + i) * load(b + i);
    float rest = sum(total);
    for (; i < width; i++) rest += widen(a[i]) * widen(b[i]);
    return rest;
}

// G heads of one query attend to the slots of its row.
// q (G, C + R), slots (count, C + R), scores (G, stride), out (G, C).
template <class T, int G>
void attend(const T* q, const T* slots, int count, int latent, int width, float scale, float* scores, int stride,
            T* out) {
    for (int s = 0; s < count; s++) {
        const T* slot = slots + int64_t(s) * width;
        f32x16 acc[G] = {};
        int i = 0;
#ifdef __AVX512BF16__
        if constexpr (sizeof(T) == 2)
            for (; i + 32 <= width; i += 32) {
                __m512bh key = (__m512bh)_mm512_loadu_si512(slot + i);
                for (int g = 0; g < G; g++)
                    acc[g] =
                        (f32x16)_mm512_dpbf16_ps((__m512)acc[g], (__m512bh)_mm512_loadu_si512(q + g * width + i), key);
            }
#endif
        for (; i + 16 <= width; i += 16)
            for (int g = 0; g < G; g++) acc[g] += load(q + g * width + i) * load(slot + i);
        for (int g = 0; g < G; g++) {
#ifdef __AVX512F__
            float score = _mm512_reduce_add_ps((__m512)acc[g]);
#else
            float score = sum(acc[g]);
#endif
            for (int j = i; j < width; j++) score += widen(q[g * width + j]) * widen(slot[j]);
            scores[g * stride + s] = score;
        }
    }
    float factor[G];
    for (int g = 0; g < G; g++) factor[g] = soften(scores + g * stride, count, scale);
    int i = 0;
    for (; i + 64 <= latent; i += 64) {
        f32x16 acc[G][4] = {};
        for (int s = 0; s < count; s++) {
            const T* slot = slots + int64_t(s) * width + i;
            f32x16 value[4] = {load(slot), load(slot + 16), load(slot + 32), load(slot + 48)};
            for (int g = 0; g < G; g++)
                for (int v = 0; v < 4; v++) acc[g][v] += scores[g * stride + s] * value[v];
        }
        for (int g = 0; g < G; g++)
            for (int j = 0; j < 64; j++) narrow(acc[g][j / 16][j % 16] * factor[g], out[g * latent + i + j]);
    }
    for (; i < latent; i++)
        for (int g = 0; g < G; g++) {
            float total = 0;
            for (int s = 0; s < count; s++) total += scores[g * stride + s] * widen(slots[int64_t(s) * width + i]);
            narrow(total * factor[g], out[g * latent + i]);
        }
}

template <class T> class Runner {
  public:
    explicit Runner(const Model& model) : m(model) {
        int64_t n = m.max_tokens, heads = m.n_heads;
        b.x.resize(n * m.d_model);
        b.low.resize(n * (m.q_rank + m.width()));
        b.q_float.resize(n * heads * m.head_dim());
        b.weights.resize(n * m.top_k);
        b.h.resize(n * m.d_model);
        b.q_latent.resize(n * m.q_rank);
        b.q.resize(n * heads * m.head_dim());
        b.q_absorbed.resize(m.rows * heads * m.width());  // of single tokens, one for each row
        b.mixed.resize(m.rows * heads * m.kv_rank);
        b.values.resize(n * heads * m.value);
        b.act.resize(n * m.widest);
        b.gathered.resize(n * m.d_model);
        b.chosen.resize(n * m.top_k);
        b.keys.resize(heads * padded(m.slots) * m.head_dim());
        b.expanded.resize(heads * padded(m.slots) * padded(m.value));
        for (auto& each : b.shrunk) each.resize(std::max({n, m.slots, m.rows * heads}) * m.rank);
    }

    void run(const Pass& pass) {
        p = &pass;
        while (own.size() < size_t(pass.threads)) own.emplace_back(new_scratch());
#pragma omp parallel num_threads(int(pass.threads))
        work(omp_get_thread_num(), omp_get_num_threads());
    }

  private:
    const Model m;
    const Pass* p = nullptr;
    Buffers<T> b;
    std::vector<Scratch<T>> own;

    static int64_t padded(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

    Scratch<T> new_scratch() const {
        int64_t inputs = std::max({m.d_model, m.widest, m.q_rank, m.kv_rank, m.n_heads * m.value, m.nope});
        Scratch<T> s;
        s.panel.resize(PANEL * inputs);
        s.out.resize(padded(std::max(m.max_tokens, m.slots)) * PANEL);
        s.group.resize(s.out.size());
        s.gate.resize(m.max_tokens * PANEL);
        s.scores.resize(QUERIES * padded(m.slots));
        s.shares.resize(QUERIES * padded(m.slots));
        s.members.resize(m.max_tokens);
        s.added.resize(m.rank ? s.out.size() : 0);
        s.whose.resize(std::max(m.max_tokens, m.slots));
        return s;
    }

    // The adapters of rows whose tokens are token_of(row); null where no token of the pass has one.
    template <class TokenOf> const int64_t* whose(int rows, TokenOf token_of, int t) {
        if (!p->adapters) return nullptr;
        for (int row = 0; row < rows; row++) own[t].whose[row] = p->adapters[token_of(row)];
        return own[t].whose.data();
    }

    // f(pair, first row, count) for neighbours that share an adapter, where it has a part of w.
    template <class F> static void each_run(const Matrix& w, const int64_t* whose, int begin, int end, F f) {
        for (int first = begin, next; first < end; first = next) {
            for (next = first + 1; next < end && whose[next] == whose[first];) next++;
            if (whose[first] >= 0 && w.pairs[whose[first]].a) f(w.pairs[whose[first]], first, next - first);
        }
    }

    // to (heads, rows, m.rank) = A times each head's part of a (rows, stride). The threads share the rows.
    void shrink(const T* a, int64_t stride, int64_t per_head, int heads, int rows, const Matrix& w,
                const int64_t* whose, std::vector<T>& to, int t, int n) {
        if (!whose || !w.pairs || !rows) return;  // for every thread alike
        Range mine = part(heads * rows, t, n);
        float* out = own[t].out.data();
        for (int head = mine.begin / rows; head * rows < mine.end; head++)
            each_run(w, whose, std::max(mine.begin - head * rows, 0), std::min(mine.end - head * rows, rows),
                     [&](const Pair& pair, int first, int count) {
                         for (int from = 0; from < pair.rank; from += PANEL) {
                             tiles(a + head * per_head + first * stride, stride, count,
                                   (const T*)pair.a + head * pair.a_step + from * w.inputs, int(w.inputs), out);
                             for (int i = 0; i < count * PANEL; i++)
                                 narrow(out[i], to[(head * rows + first + i / PANEL) * m.rank + from + i % PANEL]);
                         }
                     });
#pragma omp barrier
    }

    // out (rows, 32) += a panel of a head's B times what `shrink` made of the head's rows.
    void expand(const T* shrunk, int rows, const Matrix& w, const int64_t* whose, int head, int panel, Scratch<T>& s,
                float* out) {
        if (!whose || !w.pairs) return;
        each_run(w, whose, 0, rows, [&](const Pair& pair, int first, int count) {
            tiles(shrunk + first * m.rank, m.rank, count,
                  (const T*)pair.b + head * pair.b_step + panel * PANEL * pair.rank, int(pair.rank), s.added.data());
            for (int i = 0; i < count * PANEL; i++) out[first * PANEL + i] += s.added[i];
        });
    }

    // A product whose panels are divided among the threads; `take(row, first output, 32 sums)` gets the sums.
    template <class Take>
    void multiply(const T* a, int64_t stride, int rows, const Matrix& w, const int64_t* whose, int t, int n,
                  Take take) {
        shrink(a, stride, 0, 1, rows, w, whose, b.shrunk[0], t, n);
        Range mine = part(w.count(), t, n);
        float* out = own[t].out.data();
        for (int panel = mine.begin; panel < mine.end; panel++) {
            product(a, stride, rows, w, panel, own[t], out);
            expand(b.shrunk[0].data(), rows, w, whose, 0, panel, own[t], out);
            int first = panel * PANEL, outputs = std::min<int>(PANEL, int(w.outputs) - first);
            for (int row = 0; row < rows; row++) take(row, first, outputs, out + row * PANEL);
        }
    }

    void work(int t, int n) {
        int count = int(p->count), width = int(m.d_model);
        Range mine = part(count, t, n);
        for (int i = mine.begin; i < mine.end; i++)
            for (int j = 0; j < width; j++) b.x[i * width + j] = widen(((const T*)m.embed)[p->tokens[i] * width + j]);
        int moe = 0;
        for (int block = 0; block < m.n_blocks; block++) {
            const Block& w = m.blocks[block];
            attention(w, block, t, n);
            for (int i = mine.begin; i < mine.end; i++)
                rms_norm(&b.x[i * width], w.ffn_norm, width, m.eps, &b.h[i * width]);
            if (w.is_moe) route(w, moe++, mine);
#pragma omp barrier
            feed_forward(&b.h[0], count, w.gate, w.up, w.down, nullptr, nullptr, p->adapters, t, n);
            if (w.is_moe) run_experts(w, t, n);
        }
        Range asked = part(int(p->wanted), t, n);
        for (int i = asked.begin; i < asked.end; i++)
            rms_norm(&b.x[p->wanted_at[i] * width], m.norm, width, m.eps, &b.h[i * width]);
#pragma omp barrier
        const int64_t* theirs = whose(int(p->wanted), [&](int row) { return p->wanted_at[row]; }, t);
        multiply(&b.h[0], width, int(p->wanted), m.head, theirs, t, n,
                 [&](int row, int first, int outputs, const float* sums) {
                     std::memcpy(p->logits + row * m.vocab + first, sums, outputs * sizeof(float));
                 });
    }

    void attention(const Block& w, int block, int t, int n) {
        int count = int(p->count), width = int(m.d_model), heads = int(m.n_heads), per_head = int(m.head_dim());
        int low = int(m.q_rank + m.width());
        Range mine = part(count, t, n);
        for (int i = mine.begin; i < mine.end; i++)
            rms_norm(&b.x[i * width], w.attention_norm, width, m.eps, &b.h[i * width]);
#pragma omp barrier
        multiply(&b.h[0], width, count, w.low, p->adapters, t, n,
                 [&](int row, int first, int outputs, const float* sums) {
                     std::memcpy(&b.low[row * low + first], sums, outputs * sizeof(float));
                 });
#pragma omp barrier
        for (int i = mine.begin; i < mine.end; i++) remember(w, block, i);
#pragma omp barrier
        multiply(&b.q_latent[0], m.q_rank, count, w.q_up, p->adapters, t, n,
                 [&](int row, int first, int outputs, const float* sums) {
                     std::memcpy(&b.q_float[row * heads * per_head + first], sums, outputs * sizeof(float));
                 });
#pragma omp barrier
        for (int i = mine.begin; i < mine.end; i++) position(i);
#pragma omp barrier
        int first = 0;
        for (int piece = 0; piece < p->pieces; first += int(p->lengths[piece++]))
            attend_to_prompt(w, block, first, int(p->lengths[piece]), t, n);
        if (first < count) attend_to_latents(w, block, first, count - first, t, n);
        multiply(&b.values[0], heads * m.value, count, w.out, p->adapters, t, n,
                 [&](int row, int first, int outputs, const float* sums) {
                     for (int j = 0; j < outputs; j++) b.x[row * width + first + j] += sums[j];
                 });
#pragma omp barrier
    }

    // For every head: head's part of a (rows, stride) times its panels; `take(head, first output, sums (rows, 32))`.
    // per_head 0: all heads have the same part. Two in turn without a barrier need two places for what is shrunk.
    template <class Take>
    void multiply_heads(const T* a, int64_t stride, int64_t per_head, int rows, const Matrix& w, const int64_t* whose,
                        std::vector<T>& shrunk, int t, int n, Take take) {
        shrink(a, stride, per_head, per_head ? int(m.n_heads) : 1, rows, w, whose, shrunk, t, n);
        int per = w.count() / int(m.n_heads);
        Range mine = part(w.count(), t, n);
        for (int panel = mine.begin; panel < mine.end; panel++) {
            float* out = own[t].out.data();
            product(a + panel / per * per_head, stride, rows, w, panel, own[t], out);
            const T* low = shrunk.data() + (per_head ? panel / per * rows * m.rank : 0);
            expand(low, rows, w, whose, panel / per, panel % per, own[t], out);
            take(panel / per, panel % per * PANEL, out);
        }
    }

    // Single tokens, absorbed: all heads attend to the latents themselves.
    void attend_to_latents(const Block& w, int block, int first, int count, int t, int n) {
        int heads = int(m.n_heads), latent = int(m.kv_rank), value = int(m.value);
        int64_t per_head = m.head_dim(), width = m.width();
        T* q = &b.q_absorbed[0];
        const int64_t* theirs = p->adapters ? p->adapters + first : nullptr;
        multiply_heads(&b.q[first * heads * per_head], heads * per_head, per_head, count, w.key_up, theirs, b.shrunk[0],
                       t, n, [&](int head, int from, const float* sums) {
                           for (int row = 0; row < count; row++)
                               for (int j = 0; j < PANEL && from + j < latent; j++)
                                   narrow(sums[row * PANEL + j], q[(row * heads + head) * width + from + j]);
                       });
        Range mine = part(count, t, n);
        for (int row = mine.begin; row < mine.end; row++)
            for (int head = 0; head < heads; head++)
                std::copy_n(&b.q[((first + row) * heads + head) * per_head + m.nope], m.rope,
                            q + (row * heads + head) * width + latent);
#pragma omp barrier
        int group = heads % 6 == 0 ? 6 : heads % 4 == 0 ? 4 : heads % 3 == 0 ? 3 : heads % 2 == 0 ? 2 : 1;
        int groups = heads / group;
#pragma omp for schedule(dynamic)
        for (int item = 0; item < count * groups; item++)
            look_back(block, first, item / groups, item % groups * group, group, own[t]);
        multiply_heads(&b.mixed[0], heads * latent, latent, count, w.value_up, theirs, b.shrunk[0], t, n,
                       [&](int head, int from, const float* sums) {
                           for (int row = 0; row < count; row++)
                               for (int j = 0; j < PANEL && from + j < value; j++)
                                   narrow(sums[row * PANEL + j],
                                          b.values[((first + row) * heads + head) * value + from + j]);
                       });
#pragma omp barrier
    }

    // A piece of a prompt, expanded: keys and values of all its slots are made, head by head, as panels of a product.
    void attend_to_prompt(const Block& w, int block, int first, int count, int t, int n) {
        int heads = int(m.n_heads), seen = int(p->positions[first]) + count, room = int(padded(seen));
        int64_t per_head = m.head_dim(), key_size = room * per_head, value_size = room * padded(m.value);
        const T* slots = slots_of(block, p->rows[first]);
        auto keys_at = [&](int head, int s) { return &b.keys[head * key_size + s / PANEL * PANEL * per_head]; };
        const int64_t* theirs = whose(seen, [&](int) { return first; }, t);  // of what the row read earlier, too
        multiply_heads(slots, m.width(), 0, seen, w.key_down, theirs, b.shrunk[0], t, n,
                       [&](int head, int from, const float* sums) {
                           for (int s = 0; s < seen; s++, sums += PANEL)
                               for (int j = 0; j < PANEL && from + j < m.nope; j += 2)
                                   put(sums[j], sums[j + 1], keys_at(head, s) + place<T>(from + j, s % PANEL));
                       });
        multiply_heads(slots, m.width(), 0, seen, w.value_up, theirs, b.shrunk[1], t, n,
                       [&](int head, int from, float* sums) {
                           T* values = &b.expanded[head * value_size + from * room];
                           std::fill(sums + seen * PANEL, sums + room * PANEL, 0.0f);
                           for (int s = 0; s < room; s += 2, sums += 2 * PANEL)
                               for (int j = 0; j < PANEL; j++) put(sums[j], sums[PANEL + j], values + place<T>(s, j));
                       });
        Range mine = part(heads, t, n);
        for (int head = mine.begin; head < mine.end; head++)
            for (int s = 0; s < seen; s++) {
                const T* key = slots + s * m.width() + m.kv_rank;
                for (int j = 0; j < m.rope; j += 2)
                    put(widen(key[j]), widen(key[j + 1]), keys_at(head, s) + place<T>(int(m.nope) + j, s % PANEL));
            }
#pragma omp barrier
        int per = (count + QUERIES - 1) / QUERIES;
#pragma omp for schedule(dynamic)
        for (int item = heads * per - 1; item >= 0; item--) {  // the longest first
            int head = item % heads, from = item / heads * QUERIES;
            attend_tile(&b.keys[head * key_size], &b.expanded[head * value_size], first + from,
                        std::min(QUERIES, count - from), room, head, own[t]);
        }
    }

    // Queries first ... first + rows - 1 of one head attend to the expanded keys and values of their prompt.
    void attend_tile(const T* keys, const T* values, int first, int rows, int room, int head, Scratch<T>& s) {
        int64_t heads = m.n_heads, per_head = m.head_dim();
        int seen = int(padded(p->positions[first + rows - 1] + 1));
        float* out = s.out.data();
        for (int slot = 0; slot < seen; slot += PANEL) {
            tiles(&b.q[(first * heads + head) * per_head], heads * per_head, rows, keys + slot * per_head,
                  int(per_head), out);
            for (int row = 0; row < rows; row++)
                std::memcpy(&s.scores[row * seen + slot], out + row * PANEL, PANEL * sizeof(float));
        }
        float factor[QUERIES];
        for (int row = 0; row < rows; row++) {
            float* scores = &s.scores[row * seen];
            int count = int(p->positions[first + row]) + 1;
            factor[row] = soften(scores, count, m.scale);
            std::fill(scores + count, scores + seen, 0.0f);
            for (int i = 0; i < seen; i++) narrow(scores[i], s.shares[row * seen + i]);
        }
        for (int from = 0; from < m.value; from += PANEL) {
            tiles(s.shares.data(), seen, rows, values + from * room, seen, out);
            for (int row = 0; row < rows; row++)
                for (int j = 0; j < PANEL && from + j < m.value; j++)
                    narrow(out[row * PANEL + j] * factor[row],
                           b.values[((first + row) * heads + head) * m.value + from + j]);
        }
    }

    // The latents of token i are normalised; the one of keys and values goes into the cache with the rotated key.
    void remember(const Block& w, int block, int i) {
        const float* low = &b.low[i * (m.q_rank + m.width())];
        rms_norm(low, w.q_norm, int(m.q_rank), m.eps, &b.q_latent[i * m.q_rank]);
        T* slot = slots_of(block, p->rows[i]) + p->positions[i] * m.width();
        rms_norm(low + m.q_rank, w.kv_norm, int(m.kv_rank), m.eps, slot);
        int64_t at = p->positions[i] * m.rope / 2;
        rotate(low + m.q_rank + m.kv_rank, m.cosine + at, m.sine + at, int(m.rope), slot + m.kv_rank);
    }

    // The queries of token i get their positions.
    void position(int i) {
        int64_t per_head = m.head_dim(), at = p->positions[i] * m.rope / 2;
        for (int64_t head = i * m.n_heads; head < (i + 1) * m.n_heads; head++) {
            const float* q = &b.q_float[head * per_head];
            for (int j = 0; j < m.nope; j++) narrow(q[j], b.q[head * per_head + j]);
            rotate(q + m.nope, m.cosine + at, m.sine + at, int(m.rope), &b.q[head * per_head + m.nope]);
        }
    }

    // Some heads of the single token `first + row` attend to the latents of its row.
    void look_back(int block, int first, int row, int head, int group, Scratch<T>& s) {
        const T* q = &b.q_absorbed[(row * m.n_heads + head) * m.width()];
        T* out = &b.mixed[(row * m.n_heads + head) * m.kv_rank];
        const T* slots = slots_of(block, p->rows[first + row]);
        int seen = int(p->positions[first + row]) + 1, stride = int(padded(m.slots));
        int latent = int(m.kv_rank), width = int(m.width());
        switch (group) {
            case 6:
                return attend<T, 6>(q, slots, seen, latent, width, m.scale, s.scores.data(), stride, out);
            case 4:
                return attend<T, 4>(q, slots, seen, latent, width, m.scale, s.scores.data(), stride, out);
            case 3:
                return attend<T, 3>(q, slots, seen, latent, width, m.scale, s.scores.data(), stride, out);
            case 2:
                return attend<T, 2>(q, slots, seen, latent, width, m.scale, s.scores.data(), stride, out);
            default:
                return attend<T, 1>(q, slots, seen, latent, width, m.scale, s.scores.data(), stride, out);
        }
    }

    T* slots_of(int block, int64_t row) const { return (T*)m.cache + (block * m.rows + row) * m.slots * m.width(); }

    // x += down(silu(gate a) * up a), for the tokens `members` with their weights; null: for all, weight 1.
    void feed_forward(const T* a, int rows, const Matrix& gate, const Matrix& up, const Matrix& down,
                      const int* members, const float* weights, const int64_t* whose, int t, int n) {
        int64_t width = m.d_model, hidden = gate.outputs;
        shrink(a, width, 0, 1, rows, gate, whose, b.shrunk[0], t, n);
        shrink(a, width, 0, 1, rows, up, whose, b.shrunk[1], t, n);
        Range mine = part(gate.count(), t, n);
        for (int panel = mine.begin; panel < mine.end; panel++) {
            float *g = own[t].gate.data(), *u = own[t].out.data();
            product(a, width, rows, gate, panel, own[t], g);
            expand(b.shrunk[0].data(), rows, gate, whose, 0, panel, own[t], g);
            product(a, width, rows, up, panel, own[t], u);
            expand(b.shrunk[1].data(), rows, up, whose, 0, panel, own[t], u);
            int first = panel * PANEL, outputs = std::min<int>(PANEL, int(hidden) - first);
            for (int row = 0; row < rows; row++, g += PANEL, u += PANEL) {
                for (int j = 0; j < PANEL; j += 16)
                    *(f32x16*)(g + j) = load(g + j) / (1.0f + exp(-load(g + j))) * load(u + j);
                for (int j = 0; j < outputs; j++) narrow(g[j], b.act[row * hidden + first + j]);
            }
        }
#pragma omp barrier
        multiply(&b.act[0], hidden, rows, down, whose, t, n, [&](int row, int first, int outputs, const float* sums) {
            int token = members ? members[row] : row;
            float weight = members ? weights[row] : 1.0f;
            for (int j = 0; j < outputs; j++) b.x[token * width + first + j] += weight * sums[j];
        });
#pragma omp barrier
    }

    // Choose the experts of these tokens: the greatest of score + bias, weighted by the score alone.
    void route(const Block& w, int moe, Range tokens) {
        int moes = 0;
        for (int block = 0; block < m.n_blocks; block++) moes += m.blocks[block].is_moe != 0;
        std::vector<float> h(m.d_model), scores(m.n_experts);
        for (int i = tokens.begin; i < tokens.end; i++) {
            for (int j = 0; j < m.d_model; j++) h[j] = widen(b.h[i * m.d_model + j]);
            for (int e = 0; e < m.n_experts; e++)
                scores[e] = 1.0f / (1.0f + std::exp(-dot(h.data(), w.centroids + e * m.d_model, int(m.d_model))));
            float total = 1e-20f;
            std::vector<bool> taken(m.n_experts);
            for (int k = 0; k < m.top_k; k++) {
                int best = -1;
                for (int e = 0; e < m.n_experts; e++)
                    if (!taken[e] && (best < 0 || scores[e] + w.balance_bias[e] > scores[best] + w.balance_bias[best]))
                        best = e;
                taken[best] = true;
                total += scores[best];
                b.chosen[i * m.top_k + k] = best;
                b.weights[i * m.top_k + k] = scores[best] * m.routed_scale;
                p->experts[(i * moes + moe) * m.top_k + k] = best;
            }
            if (m.normalise)
                for (int k = 0; k < m.top_k; k++) b.weights[i * m.top_k + k] /= total;
        }
    }

    void run_experts(const Block& w, int t, int n) {
        int* members = own[t].members.data();
        std::vector<float> weights;
        for (int e = 0; e < m.n_experts; e++) {
            int rows = 0;
            weights.clear();
            for (int choice = 0; choice < p->count * m.top_k; choice++)
                if (b.chosen[choice] == e) {
                    members[rows++] = choice / int(m.top_k);
                    weights.push_back(b.weights[choice]);
                }
            if (!rows) continue;  // for every thread alike
            Range mine = part(rows, t, n);
            for (int i = mine.begin; i < mine.end; i++)
                std::copy_n(&b.h[members[i] * m.d_model], m.d_model, &b.gathered[i * m.d_model]);
#pragma omp barrier
            const int64_t* theirs = whose(rows, [&](int row) { return members[row]; }, t);
            feed_forward(&b.gathered[0], rows, w.experts[3 * e], w.experts[3 * e + 1], w.experts[3 * e + 2], members,
                         weights.data(), theirs, t, n);
        }
    }
};

// --- which token comes next ---

constexpr int GROUP = 64;  // neighbouring tokens whose weights are added up before one of them is looked for

// Where `number`, in [0, 1), falls among the cumulated probabilities of softmax(logits / temperature), of the tokens whose
// bit is set in `allowed` (null: all) and whose probability is not 0; at temperature 0 the most likely of these.
// `logprob` is its log-probability among all tokens. weights has room for the next multiple of GROUP. -1: there is none.
int64_t draw_one(const float* logits, int vocab, float temperature, float number, const uint8_t* allowed,
                 float* weights, float* logprob) {
    int room = (vocab + GROUP - 1) / GROUP * GROUP;
    float scale = temperature > 0 ? temperature : 1, greatest;
    auto begin = [&] {
        for (int i = 0; i < vocab; i++) weights[i] = logits[i] / scale;
        std::fill(weights + vocab, weights + room, -INFINITY);
    };
    auto set_others = [&](float weight) {  // of tokens that are not allowed
        i32x16 bits;
        for (int lane = 0; lane < 16; lane++) bits[lane] = 1 << lane;
        for (int i = 0; i < room; i += 16) {
            int here = allowed[i / 8] | allowed[i / 8 + 1] << 8;
            *(f32x16*)(weights + i) = ((i32x16{} + here) & bits) != 0 ? load(weights + i) : f32x16{} + weight;
        }
    };
    auto find_greatest = [&] {
        f32x16 most = load(weights);
        for (int i = 16; i < room; i += 16) most = load(weights + i) > most ? load(weights + i) : most;
        greatest = -INFINITY;
        for (int i = 0; i < 16; i++) greatest = std::max(greatest, most[i]);
    };
    auto exponentiate = [&] {
        for (int i = 0; i < room; i += 16) {
            f32x16 away = load(weights + i) - greatest;  // exp stops at -87, so what is farther away is set to 0
            *(f32x16*)(weights + i) = away < -87.0f ? f32x16{} : exp(away);
        }
    };
    auto sum_of = [&](int first) {
        f32x16 sums = load(weights + first);
        for (int i = 16; i < GROUP; i += 16) sums += load(weights + first + i);
        return double(sum(sums));
    };
    auto sum_up = [&] {
        double total = 0;
        for (int first = 0; first < room; first += GROUP) total += sum_of(first);
        return total;
    };
    begin(), find_greatest(), exponentiate();
    double total = sum_up(), greatest_of_all = greatest, log_total = std::log(total);
    if (!(total > 0)) return -1;  // logits that are no numbers
    if (allowed) set_others(0), total = sum_up();
    if (allowed && (total == 0 || temperature == 0)) {
        begin(), set_others(-INFINITY), find_greatest();
        if (!(greatest > -INFINITY)) return -1;
        if (temperature > 0) exponentiate(), total = sum_up();  // float32 held none of their weights
    }
    int last = 0;
    if (temperature == 0) {
        while (logits[last] != greatest || (allowed && !(allowed[last / 8] >> last % 8 & 1))) last++;
    } else {
        double wanted = number * total, before = 0;
        int first = 0;  // groups with a weight: the one that is looked at, and, should rounding skip it, its end
        for (int group = 0; group < room; group += GROUP) {
            double here = sum_of(group);
            if (here == 0) continue;
            first = group;
            if (before + here > wanted) break;
            before += here;
        }
        for (int i = first; i < std::min(first + GROUP, vocab); i++) {
            if (weights[i] == 0) continue;
            last = i;
            before += weights[i];
            if (before > wanted) break;
        }
    }
    *logprob = float(double(logits[last] / scale) - greatest_of_all - log_total);
    return last;
}

}  // namespace

// A runner, or null where there is no memory for it.
template <class T>
void* open(const Model& model) try {
    return new Runner<T>(model);
} catch (const std::bad_alloc&) {
    return nullptr;
}

extern "C" {

void* open_float(const Model* model) { return open<float>(*model); }
void* open_bf16(const Model* model) { return open<bf16>(*model); }
void run_float(void* runner, const Pass* pass) { ((Runner<float>*)runner)->run(*pass); }
void run_bf16(void* runner, const Pass* pass) { ((Runner<bf16>*)runner)->run(*pass); }
void close_float(void* runner) { delete (Runner<float>*)runner; }
void close_bf16(void* runner) { delete (Runner<bf16>*)runner; }

// One token for each of these places in logits (any, vocab), with a number of its own and, unless null, the bits of what
// is allowed.
void draw(const float* logits, const int64_t* places, int64_t rows, int64_t vocab, float temperature,
          const float* numbers, const uint8_t* allowed, int64_t* ids, float* logprobs, int64_t threads) {
#pragma omp parallel num_threads(int(threads))
    {
        std::vector<float> weights((vocab + GROUP - 1) / GROUP * GROUP);
        int64_t bytes = int64_t(weights.size()) / 8;
#pragma omp for
        for (int64_t row = 0; row < rows; row++)
            ids[row] = draw_one(logits + places[row] * vocab, int(vocab), temperature, numbers[row],
                                allowed ? allowed + row * bytes : nullptr, weights.data(), logprobs + row);
    }
}
}
