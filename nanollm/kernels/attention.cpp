// Attention of packed conversations, forward and backward, as fast as the matrix products around it.
//
// Causal attention of expanded latents in bfloat16 for CPUs that multiply it: softmax(scale q k) v, where a head's key
// is its own part without position beside the one rotary key of all heads. Keys, values and their gradients stay where
// the projections put them; scores exist for a few queries of one head at a time (FlashAttention, arXiv:2205.14135, with
// whole rows of scores: they fit into the cache of a core). The backward pass computes scores with keys as rows and
// queries as lanes, so that every product after it finds its operands in the order it reads them.
// Letters: B rows, T tokens, S the same padded to whole panels, H heads, N width without position, R rotary width,
// D = N + R, V value width. Every item of work is one head of one row; sums have a fixed order.

#include <vector>
#include <omp.h>
#include "vectors.h"

namespace {

constexpr int QUERIES = 24;   // that attend together, forward
constexpr int COLUMNS = 128;  // queries whose shares wait for one product, backward

struct Attention {
    int64_t rows, tokens, heads, nope, rope, value, threads;
    float scale;
    const int32_t* spans;   // (B, T, 3): where a token's text begins, its shared part ends, its own begins; null: at 0
    const bf16* q;          // (B, T, H, D)
    const bf16* kv;         // (B, T, H, N + V)
    const bf16* key_rope;   // (B, T, R)
    bf16* out;              // (B, T, H, V)
    float* sums;            // (B, H, T): log of the sum of a query's exponentials
    // The backward pass only.
    const bf16* out_grad;    // (B, T, H, V)
    bf16* q_grad;            // (B, T, H, D)
    bf16* kv_grad;           // (B, T, H, N + V)
    bf16* key_rope_grad;     // (B, T, R)
    float* key_rope_shares;  // (B, H, T, R): each head's part of it
    int64_t width() const { return nope + rope; }
    int64_t padded() const { return (tokens + PANEL - 1) / PANEL * PANEL; }
    int64_t span(int64_t row, int64_t t, int which) const { return spans ? spans[(row * tokens + t) * 3 + which] : 0; }
    int64_t start(int64_t row, int64_t t) const { return span(row, t, 0); }
};

inline u16x16 narrowed(f32x16 x) {
#ifdef __AVX512BF16__
    return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
    u16x16 y;
    for (int i = 0; i < 16; i++) y[i] = uint16_t(rounded(x[i]));
    return y;
#endif
}

inline u16x16 bits(const bf16* x) { return *(const u16x16*)x; }
inline void put(u16x16 x, bf16* y) { *(u16x16*)y = x; }

// Neighbouring inputs of 16 outputs, as a panel wants them.
inline void put_pairs(u16x16 even, u16x16 odd, bf16* y) {
    *(u32x16*)y = __builtin_convertvector(even, u32x16) | __builtin_convertvector(odd, u32x16) << 16;
}

void narrow_all(const float* x, int64_t count, bf16* y) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) put(narrowed(load(x + i)), y + i);
    for (; i < count; i++) narrow(x[i], y[i]);
}

// One head's vectors, `width` numbers each: `count` of them, `stride` apart.
struct Vectors {
    const bf16* at;
    int64_t stride, count;
};

// Vectors become the outputs of a product: panels [vector / 32][i / 2][32][2], where i begins at `first` of `width`.
void as_outputs(Vectors x, int64_t first, int64_t part, int64_t width, bf16* panels) {
    for (int64_t s = 0; s < x.count; s++) {
        uint32_t* lane = (uint32_t*)(panels + s / PANEL * PANEL * width) + first / 2 * PANEL + s % PANEL;
        const uint32_t* pairs = (const uint32_t*)(x.at + s * x.stride);
        for (int64_t i = 0; i < part / 2; i++) lane[i * PANEL] = pairs[i];
    }
}

// Vectors become the inputs of a product: panels [i / 32][vector / 2][32][2]; beyond the last vector lies `room`.
void as_inputs(Vectors x, int64_t width, int64_t room, bf16* panels) {
    for (int64_t first = 0; first < width; first += PANEL, panels += PANEL * room)
        for (int64_t s = 0; s < x.count; s += 2)
            for (int i = 0; i < PANEL; i += 16) {
                const bf16* even = x.at + s * x.stride + first + i;
                put_pairs(bits(even), s + 1 < x.count ? bits(even + x.stride) : u16x16{}, panels + s * PANEL + 2 * i);
            }
}

class Forward {
  public:
    explicit Forward(const Attention& attention) : a(attention) {
        int64_t room = a.padded();
        keys.resize(room * a.width());
        values.resize(room * a.value);
        scores.resize(QUERIES * (room + 16));
        shares.resize(QUERIES * (room + 16));
        out.resize(QUERIES * PANEL);
    }

    void head(int64_t row, int64_t head) {
        int64_t width = a.nope + a.value, room = a.padded(), first = row * a.tokens;
        const bf16* kv = a.kv + (first * a.heads + head) * width;
        as_outputs({kv, a.heads * width, a.tokens}, 0, a.nope, a.width(), keys.data());
        as_outputs({a.key_rope + first * a.rope, a.rope, a.tokens}, a.nope, a.rope, a.width(), keys.data());
        as_inputs({kv + a.nope, a.heads * width, a.tokens}, a.value, room, values.data());
        for (int64_t t = 0; t < a.tokens; t += QUERIES) look(row, head, t, int(std::min<int64_t>(QUERIES, a.tokens - t)));
    }

  private:
    const Attention& a;
    std::vector<bf16> keys, values, shares;
    std::vector<float> scores, out;

    // Queries t ... t + count - 1 of a head.
    void look(int64_t row, int64_t head, int64_t t, int count) {
        int64_t from = a.start(row, t) / PANEL * PANEL, seen = (t + count + PANEL - 1) / PANEL * PANEL;
        int64_t stride = seen - from + 16;
        const bf16* q = a.q + ((row * a.tokens + t) * a.heads + head) * a.width();
        for (int64_t s = from; s < seen; s += PANEL) {
            tiles(q, a.heads * a.width(), count, &keys[s * a.width()], int(a.width()), out.data());
            for (int i = 0; i < count; i++) std::memcpy(&scores[i * stride + s - from], &out[i * PANEL], PANEL * 4);
        }
        float factor[QUERIES];
        for (int i = 0; i < count; i++) {
            int64_t begin = a.start(row, t + i) - from, end = t + i + 1 - from;
            int64_t shared = a.span(row, t + i, 1) - from, own = a.span(row, t + i, 2) - from;
            float *line = &scores[i * stride], greatest;
            std::fill(line + shared, line + own, -1e30f);
            factor[i] = soften(line + begin, int(end - begin), a.scale, &greatest);
            a.sums[(row * a.heads + head) * a.tokens + t + i] = greatest * a.scale - std::log(factor[i]);
            std::fill(line, line + begin, 0.0f);
            std::fill(line + shared, line + own, 0.0f);
            std::fill(line + end, line + seen - from, 0.0f);
            narrow_all(line, seen - from, &shares[i * stride]);
        }
        for (int64_t v = 0; v < a.value; v += PANEL) {
            tiles(shares.data(), stride, count, &values[v * a.padded() + from * PANEL], int(seen - from), out.data());
            for (int i = 0; i < count; i++)
                for (int j = 0; j < PANEL; j += 16)
                    put(narrowed(load(&out[i * PANEL + j]) * factor[i]),
                        a.out + ((row * a.tokens + t + i) * a.heads + head) * a.value + v + j);
        }
    }
};

class Backward {
  public:
    explicit Backward(const Attention& attention) : a(attention), room(attention.padded()) {
        keys.resize(room * a.width());
        keys_in.resize(room * a.width());
        q_out.resize(room * a.width());
        q_in.resize(room * a.width());
        grad_out.resize(room * a.value);
        grad_in.resize(room * a.value);
        shares.resize(room * COLUMNS);
        slopes.resize(room * COLUMNS);
        slopes_in.resize(room * PANEL);
        scores.resize(room * PANEL);
        gains.resize(room * PANEL);
        means.resize(room);
        key_grad.resize(room * a.width());
        value_grad.resize(room * a.value);
        product.resize(room * PANEL);
    }

    void head(int64_t row, int64_t head) {
        pack(row, head);
        std::fill(key_grad.begin(), key_grad.end(), 0.0f);
        std::fill(value_grad.begin(), value_grad.end(), 0.0f);
        for (int64_t first = 0; first < room; first += COLUMNS) {
            int64_t columns = std::min<int64_t>(COLUMNS, room - first);
            int64_t from = a.start(row, first) / PANEL * PANEL, seen = first + columns;
            for (int64_t t = first; t < seen; t += PANEL) look(row, head, t, t - first, from, seen);
            add(shares.data(), from, seen, grad_in.data() + first * PANEL, columns, a.value, value_grad.data());
            add(slopes.data(), from, seen, q_in.data() + first * PANEL, columns, a.width(), key_grad.data());
        }
        store(row, head);
    }

  private:
    const Attention& a;
    int64_t room;
    std::vector<bf16> keys;                                     // (S, D)
    std::vector<bf16> keys_in, q_out, q_in, grad_out, grad_in;  // as inputs and as outputs of a product
    std::vector<bf16> shares, slopes;                  // (S, COLUMNS): softmax, and the gradient of the scores
    std::vector<bf16> slopes_in;                       // those of 32 queries, as a panel with keys as inputs
    std::vector<float> scores, gains;                  // (S, 32): q k, and the gradient of the shares
    std::vector<float> means;                          // (S,): out_grad out
    std::vector<float> key_grad, value_grad, product;

    void pack(int64_t row, int64_t head) {
        int64_t width = a.nope + a.value, first = row * a.tokens, values = a.heads * a.value;
        const bf16* kv = a.kv + (first * a.heads + head) * width;
        for (int64_t s = 0; s < a.tokens; s++) {
            bf16* key = &keys[s * a.width()];
            std::copy_n(kv + s * a.heads * width, a.nope, key);
            std::copy_n(a.key_rope + (first + s) * a.rope, a.rope, key + a.nope);
        }
        as_inputs({keys.data(), a.width(), a.tokens}, a.width(), room, keys_in.data());
        Vectors q = {a.q + (first * a.heads + head) * a.width(), a.heads * a.width(), a.tokens};
        Vectors grad = {a.out_grad + (first * a.heads + head) * a.value, values, a.tokens};
        as_outputs(q, 0, a.width(), a.width(), q_out.data());
        as_inputs(q, a.width(), room, q_in.data());
        as_outputs(grad, 0, a.value, a.value, grad_out.data());
        as_inputs(grad, a.value, room, grad_in.data());
        const bf16* out = a.out + (first * a.heads + head) * a.value;
        for (int64_t t = 0; t < a.tokens; t++) {
            f32x16 total = {};
            for (int64_t i = 0; i < a.value; i += 16) total += load(grad.at + t * values + i) * load(out + t * values + i);
            means[t] = sum(total);
        }
    }

    // Queries t ... t + 31: their shares and slopes at `column`, for keys from ... seen - 1; their own gradient.
    void look(int64_t row, int64_t head, int64_t t, int64_t column, int64_t from, int64_t seen) {
        int64_t begin = a.start(row, t) / PANEL * PANEL, end = t + PANEL;
        for (int64_t s = from; s < seen; s++)
            if (s < begin || s >= end) {
                std::fill_n(&shares[s * COLUMNS + column], PANEL, bf16{});
                std::fill_n(&slopes[s * COLUMNS + column], PANEL, bf16{});
            }
        int64_t count = std::min(end, a.tokens) - begin, stride = a.heads * (a.nope + a.value);
        const bf16* values = a.kv + ((row * a.tokens + begin) * a.heads + head) * (a.nope + a.value) + a.nope;
        tiles(&keys[begin * a.width()], a.width(), int(count), &q_out[t * a.width()], int(a.width()), scores.data());
        tiles(values, stride, int(count), &grad_out[t * a.value], int(a.value), gains.data());
        std::fill(&scores[count * PANEL], &scores[(end - begin) * PANEL], 0.0f);
        std::fill(&gains[count * PANEL], &gains[(end - begin) * PANEL], 0.0f);
        soften_across(row, head, t, column, begin, end);
        int rows = int(std::min<int64_t>(PANEL, a.tokens - t));
        bf16* q_grad = a.q_grad + ((row * a.tokens + t) * a.heads + head) * a.width();
        for (int64_t first = 0; first < a.width(); first += PANEL) {
            const bf16* panel = &keys_in[first * room + begin * PANEL];
            for (int i = 0; i < PANEL; i += 8)  // a row is a lane of slopes_in: pairs of its keys are a panel's line apart
                tile<8>(&slopes_in[2 * i], 2, panel, int(end - begin), &product[i * PANEL], 2 * PANEL);
            for (int i = 0; i < rows; i++)
                narrow_all(&product[i * PANEL], PANEL, q_grad + i * a.heads * a.width() + first);
        }
    }

    // Queries t ... t + 31, lanes of two vectors, against keys begin ... end - 1: shares, slopes, slopes_in.
    void soften_across(int64_t row, int64_t head, int64_t t, int64_t column, int64_t begin, int64_t end) {
        i32x16 place[2], start[2], shared[2], own[2];
        f32x16 log_sum[2] = {}, mean[2] = {};
        for (int i = 0; i < PANEL; i++) {
            bool is_token = t + i < a.tokens;
            place[i / 16][i % 16] = is_token ? int(t + i) : -1;  // before every key: sees none
            start[i / 16][i % 16] = is_token ? int(a.start(row, t + i)) : 0;
            shared[i / 16][i % 16] = is_token ? int(a.span(row, t + i, 1)) : 0;
            own[i / 16][i % 16] = is_token ? int(a.span(row, t + i, 2)) : 0;
            log_sum[i / 16][i % 16] = is_token ? a.sums[(row * a.heads + head) * a.tokens + t + i] : 0.0f;
            mean[i / 16][i % 16] = is_token ? means[t + i] : 0.0f;
        }
        auto slope_at = [&](int64_t s, int half) {
            int64_t at = (s - begin) * PANEL + half * 16, to = s * COLUMNS + column + half * 16;
            f32x16 share = exp(load(&scores[at]) * a.scale - log_sum[half]);
            i32x16 is_seen = (int(s) >= own[half]) | ((int(s) >= start[half]) & (int(s) < shared[half]));
            share = (int(s) <= place[half]) & is_seen ? share : f32x16{};
            u16x16 slope = narrowed(share * (load(&gains[at]) - mean[half]) * a.scale);
            put(narrowed(share), &shares[to]);
            put(slope, &slopes[to]);
            return slope;
        };
        for (int64_t s = begin; s < end; s += 2)
            for (int half = 0; half < 2; half++) {
                u16x16 even = slope_at(s, half), odd = slope_at(s + 1, half);
                put_pairs(even, odd, &slopes_in[(s - begin) * PANEL + half * 32]);
            }
    }

    // total (S, width) += shares (S, columns) times panels with queries as inputs.
    void add(const bf16* shares, int64_t from, int64_t seen, const bf16* panels, int64_t columns, int64_t width,
             float* total) {
        for (int64_t first = 0; first < width; first += PANEL, panels += PANEL * room) {
            tiles(shares + from * COLUMNS, COLUMNS, int(seen - from), panels, int(columns), product.data());
            for (int64_t s = from; s < seen; s++)
                for (int j = 0; j < PANEL; j += 16)
                    *(f32x16*)(total + s * width + first + j) += load(&product[(s - from) * PANEL + j]);
        }
    }

    void store(int64_t row, int64_t head) {
        int64_t width = a.nope + a.value;
        for (int64_t s = 0; s < a.tokens; s++) {
            bf16* kv_grad = a.kv_grad + ((row * a.tokens + s) * a.heads + head) * width;
            narrow_all(&key_grad[s * a.width()], a.nope, kv_grad);
            narrow_all(&value_grad[s * a.value], a.value, kv_grad + a.nope);
            std::memcpy(a.key_rope_shares + ((row * a.heads + head) * a.tokens + s) * a.rope,
                        &key_grad[s * a.width() + a.nope], a.rope * 4);
        }
    }
};

template <class Work> void each_head(const Attention& a) {
#pragma omp parallel num_threads(int(a.threads))
    {
        Work work(a);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < a.rows * a.heads; item++) work.head(item / a.heads, item % a.heads);
    }
}

}  // namespace

extern "C" {

void attend(const Attention* a) { each_head<Forward>(*a); }

void attend_backward(const Attention* a) {
    each_head<Backward>(*a);
    int64_t size = a->tokens * a->rope;
#pragma omp parallel for num_threads(int(a->threads))
    for (int64_t i = 0; i < a->rows * size; i++) {
        float total = 0;
        for (int64_t head = 0; head < a->heads; head++)
            total += a->key_rope_shares[(i / size * a->heads + head) * size + i % size];
        narrow(total, a->key_rope_grad[i]);
    }
}
}
