// Text to ids, word by word, as fast as it can be read.
//
// words.py says what a word is and why words may be spelled one by one; this file does the same. A word that was met
// before is found in a table; a new one is spelled by joining neighbours, the best pair first, the leftmost of equals:
// byte pair encoding as SentencePiece has it.

#include <algorithm>
#include <bitset>
#include <cstdint>
#include <cstring>
#include <queue>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr int64_t kShort = 15;  // bytes of a text that fits into a key
constexpr int64_t kInSlot = 3;  // ids of a word that fit into its slot
constexpr int kAhead = 32;      // words
constexpr size_t kMaybe = size_t{1} << 20;
constexpr char kSpaceMark[] = "\xE2\x96\x81";
constexpr int64_t kMarkBytes = 3;
constexpr uint16_t kFollowing = 1, kLeads = 0x8000;  // of the kinds of characters

struct Text {
    const char* at;  // 16 bytes can be read here, however short the text is
    int64_t size;
};

// A short text and, in the last byte, its size. No text: all zero.
struct Key {
    uint64_t low, high;
    bool operator==(const Key& other) const { return low == other.low && high == other.high; }
};

uint64_t first_bytes(uint64_t eight, int64_t count) {  // count from 0 to 7; little-endian, as all our machines
    return eight & ((uint64_t{1} << (8 * count)) - 1);
}

Key key_of(Text text) {
    Key key;
    std::memcpy(&key, text.at, sizeof key);
    if (text.size < 8) {
        key.low = first_bytes(key.low, text.size);
        key.high = 0;
    } else {
        key.high = first_bytes(key.high, text.size - 8);
    }
    key.high |= static_cast<uint64_t>(text.size) << 56;
    return key;
}

uint64_t hash_of(Key key) {
    uint64_t hash = (key.low ^ (key.high * 0x9E3779B97F4A7C15u)) * 0xD6E8FEB86659FD93u;
    hash ^= hash >> 32;
    return hash * 0xD6E8FEB86659FD93u >> 16;
}

// A text as a table looks for it. Long ones have no key.
struct Name {
    explicit Name(Text text) : text(text) {
        if (text.size <= kShort) hash = hash_of(key = key_of(text));
    }
    Name() = default;

    Text text{};
    Key key{};
    uint64_t hash = 0;
};

// Up to three ids, or where more of them stand.
struct Ids {
    int32_t count = 0;
    int32_t ids[kInSlot] = {};
};

// From texts to something about each: short ones in slots of one cache line at most, long ones elsewhere.
template <class Value> class Table {
   public:
    Table() { clear(); }

    void clear() {
        slots_.assign(size_t{1} << 14, Slot{});
        long_.clear();
        count_ = 0;
    }

    void fetch(const Name& name) const { __builtin_prefetch(&slots_[name.hash & (slots_.size() - 1)]); }

    const Value* find(const Name& name) const {
        if (name.text.size > kShort) {
            const auto found = long_.find(std::string(name.text.at, name.text.size));
            return found == long_.end() ? nullptr : &found->second;
        }
        for (size_t at = name.hash & (slots_.size() - 1);; at = (at + 1) & (slots_.size() - 1)) {
            if (slots_[at].key == name.key) return &slots_[at].value;
            if (slots_[at].key == Key{}) return nullptr;
        }
    }

    void add(const Name& name, const Value& value) {  // not there yet
        if (name.text.size > kShort) {
            long_.emplace(std::string(name.text.at, name.text.size), value);
            return;
        }
        if (2 * ++count_ > slots_.size()) grow();
        put(slots_, Slot{name.key, value});
    }

   private:
    struct alignas(32) Slot {  // half a cache line
        Key key{};
        Value value{};
    };

    static void put(std::vector<Slot>& slots, const Slot& slot) {
        size_t at = hash_of(slot.key) & (slots.size() - 1);
        while (!(slots[at].key == Key{})) at = (at + 1) & (slots.size() - 1);
        slots[at] = slot;
    }

    void grow() {
        std::vector<Slot> wider(2 * slots_.size());
        for (const Slot& slot : slots_)
            if (!(slot.key == Key{})) put(wider, slot);
        slots_.swap(wider);
    }

    std::vector<Slot> slots_;
    std::unordered_map<std::string, Value> long_;
    size_t count_ = 0;
};

struct Piece {
    int32_t token = -1;  // there is none
    float score = 0;
};

struct Part {  // of a word that is being spelled: at first a character
    int32_t start, size, before, after, token;
};

struct Pair {
    float score;
    int32_t left, right, size, token;
    bool operator<(const Pair& other) const {  // the greatest is joined first
        return score < other.score || (score == other.score && left > other.left);
    }
};

class Speller {
   public:
    Speller(const char* pieces, const int64_t* ends, const int32_t* tokens, const float* scores, int64_t count,
            const int32_t* bytes, const uint16_t* kinds, int64_t most_remembered)
        : most_remembered_(most_remembered),
          bytes_(bytes, bytes + 256),
          kinds_(kinds, kinds + 0x110000),
          ascii_(size_t{1} << 14) {
        for (int64_t n = 0, start = 0; n < count; start = ends[n++]) {
            const Text text{pieces + start, ends[n] - start};
            const Name name(text);
            pieces_.add(name, Piece{tokens[n], scores[n]});
            maybe_a_piece_[name.hash % kMaybe] = true;
        }
        for (int first = 0; first < 128; ++first)
            for (int second = 0; second < 128; ++second) {
                char text[sizeof(Key)] = {static_cast<char>(first), static_cast<char>(second)};
                const Piece* found = pieces_.find(Name(Text{text, second ? 2 : 1}));
                if (found) ascii_[first << 7 | second] = *found;
            }
    }

    int64_t spell(const char* text, const int64_t* ends, int64_t count, int32_t* out, int64_t* lengths) {
        const int32_t* const first = out;
        for (int64_t n = 0, start = 0; n < count; start = ends[n++]) {
            const int32_t* const before = out;
            const char *at = text + start, *const end = text + ends[n];
            while (at < end) {
                // Several at a time: what memory knows of the last has come when the first is done.
                int count = 0;
                for (; count < kAhead && at < end; ++count) {
                    const char* const next = end_of_word(at, end);
                    ahead_[count] = Name(Text{at, next - at});
                    words_.fetch(ahead_[count]);
                    at = next;
                }
                for (int word = 0; word < count; ++word) out = append(ahead_[word], out);
            }
            lengths[n] = out - before;
        }
        return out - first;
    }

   private:
    static int64_t bytes_of_char(const char* at) {
        const uint8_t lead = static_cast<uint8_t>(*at);
        return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    }

    static uint32_t char_at(const char* at, int64_t size) {
        const auto low = [at](int n) { return static_cast<uint32_t>(static_cast<uint8_t>(at[n])) & 0x3F; };
        const uint32_t lead = static_cast<uint8_t>(*at);
        switch (size) {
            case 1: return lead;
            case 2: return (lead & 0x1F) << 6 | low(1);
            case 3: return (lead & 0x0F) << 12 | low(1) << 6 | low(2);
            default: return (lead & 0x07) << 18 | low(1) << 12 | low(2) << 6 | low(3);
        }
    }

    const char* end_of_word(const char* at, const char* end) const {
        const char* const start = at;
        while (at < end && *at == ' ') ++at;
        if (at == end) return at;
        int64_t size = bytes_of_char(at);
        uint32_t character = char_at(at, size);
        if (character == 0x2581 && at > start) return at;  // else it would look like one of those spaces
        uint16_t kind = kinds_[character];
        at += size;
        if (kind == 0) return at;
        for (uint16_t next; at < end; at += size, kind = next) {
            size = bytes_of_char(at);
            next = kinds_[char_at(at, size)];
            const bool leads = kind & kLeads && (next & ~kLeads) == kFollowing;
            if ((next & ~kLeads) != (kind & ~kLeads) && !leads) break;
        }
        return at;
    }

    int32_t* append(const Name& word, int32_t* out) {
        if (const Ids* known = words_.find(word)) {
            if (known->count <= kInSlot) {
                std::memcpy(out, known->ids, sizeof known->ids);  // all three: what follows is written later
            } else {
                std::memcpy(out, &ids_[known->ids[0]], known->count * sizeof(int32_t));
            }
            return out + known->count;
        }
        if (remembered_ > most_remembered_) {
            words_.clear();
            ids_.clear();
            remembered_ = 0;
        }
        int32_t* const after = join(word.text, out);
        Ids spelled{static_cast<int32_t>(after - out)};
        if (spelled.count <= kInSlot) {
            std::copy(out, after, spelled.ids);
        } else {
            spelled.ids[0] = static_cast<int32_t>(ids_.size());
            ids_.insert(ids_.end(), out, after);
        }
        words_.add(word, spelled);
        remembered_ += sizeof(Key) + sizeof(Ids) + (word.text.size + spelled.count * sizeof(int32_t));
        return after;
    }

    int32_t* join(Text word, int32_t* out) {
        if (word.size == kMarkBytes && !std::memcmp(word.at, kSpaceMark, kMarkBytes)) return spell_bytes(word, out);
        parts_.clear();
        for (int32_t start = 0; start < word.size;) {
            const int32_t bytes = static_cast<int32_t>(bytes_of_char(word.at + start));
            const int32_t n = static_cast<int32_t>(parts_.size());
            parts_.push_back(Part{start, bytes, n - 1, n + 1, piece_at(word.at + start, bytes).token});
            start += bytes;
        }
        parts_.back().after = -1;
        for (int32_t n = 1; n < static_cast<int32_t>(parts_.size()); ++n) propose(word, n - 1, n);
        while (!pairs_.empty()) {
            const Pair pair = pairs_.top();
            pairs_.pop();
            Part &left = parts_[pair.left], &right = parts_[pair.right];
            if (left.size == 0 || right.size == 0 || left.size + right.size != pair.size) continue;  // joined meanwhile
            left.size = pair.size;
            left.token = pair.token;
            left.after = right.after;
            right.size = 0;
            if (left.after >= 0) parts_[left.after].before = pair.left;
            propose(word, left.before, pair.left);
            propose(word, pair.left, left.after);
        }
        for (int32_t n = 0; n >= 0; n = parts_[n].after) {
            const Part& part = parts_[n];
            if (part.token >= 0)
                *out++ = part.token;
            else
                out = spell_bytes(Text{word.at + part.start, part.size}, out);
        }
        return out;
    }

    void propose(Text word, int32_t left, int32_t right) {
        if (left < 0 || right < 0) return;
        const int32_t size = parts_[left].size + parts_[right].size;
        const Piece piece = piece_at(word.at + parts_[left].start, size);
        if (piece.token >= 0) pairs_.push(Pair{piece.score, left, right, size, piece.token});
    }

    Piece piece_at(const char* at, int32_t size) const {
        if (size <= 2) {
            const uint8_t first = static_cast<uint8_t>(at[0]), second = size == 2 ? static_cast<uint8_t>(at[1]) : 0;
            if ((first | second) < 128 && (size == 1 || second)) return ascii_[first << 7 | second];
        }
        const Name name(Text{at, size});
        if (!maybe_a_piece_[name.hash % kMaybe]) return Piece{};
        const Piece* found = pieces_.find(name);
        return found ? *found : Piece{};
    }

    int32_t* spell_bytes(Text text, int32_t* out) const {
        for (int64_t n = 0; n < text.size; ++n) *out++ = bytes_[static_cast<uint8_t>(text.at[n])];
        return out;
    }

    const int64_t most_remembered_;  // bytes
    int64_t remembered_ = 0;
    Name ahead_[kAhead];  // words to be looked up
    std::vector<int32_t> bytes_;
    std::vector<uint16_t> kinds_;  // of each character; 0: none is ever joined to it
    Table<Piece> pieces_;
    std::bitset<kMaybe> maybe_a_piece_;  // most of what is asked for is not, and this is small enough to be near
    std::vector<Piece> ascii_;  // those of two characters, [first][second], and of one, [first][0]
    Table<Ids> words_;
    std::vector<int32_t> ids_;
    std::vector<Part> parts_;  // of the word at work
    std::priority_queue<Pair> pairs_;
};

// How often each word of a text stands in it, for a tokenizer to learn from; text/train_tokenizer.py says what a word is there.
class Counter {
   public:
    void count(const char* at, const char* const end) {
        while (at < end) {
            const char* line_end = static_cast<const char*>(std::memchr(at, '\n', end - at));
            line_end = line_end ? line_end : end;
            while (line_end < end && *line_end == '\n') ++line_end;
            int64_t spaces = 0;  // before the end of the line
            while (at < line_end) {
                const char* const start = at;
                while (at < line_end && *at == ' ') ++at;
                if (at == line_end) {
                    spaces = at - start;
                } else if (kind(*at) == kAlone) {
                    if (at > start) meet(Text{start, at - start});
                    meet(Text{at++, 1});
                } else {
                    const bool leads = kind(*at) == kMark && at == start && at + 1 < line_end && kind(at[1]) == kLetter;
                    const Kind first = kind(*(at += leads));
                    while (at < line_end && kind(*at) == first) ++at;
                    meet(Text{start, at - start});
                }
            }
            if (spaces >= static_cast<int64_t>(last_.size())) last_.resize(spaces + 1);
            ++last_[spaces];
        }
    }

    void end() {
        count_met();
        spaces_.assign(last_.size() + sizeof(Key), ' ');
        for (size_t spaces = 0; spaces < last_.size(); ++spaces)
            if (last_[spaces]) add(Name(Text{spaces_.data(), static_cast<int64_t>(spaces + 1)}), last_[spaces]);
    }

    int64_t words() const { return static_cast<int64_t>(words_.size()); }
    int64_t bytes() const {
        int64_t bytes = 0;
        for (const Text& word : words_) bytes += word.size;
        return bytes;
    }

    void take(char* text, int64_t* ends, int64_t* counts) const {
        int64_t end = 0;
        for (size_t n = 0; n < words_.size(); ++n) {
            std::memcpy(text + end, words_[n].at, words_[n].size);
            ends[n] = end += words_[n].size;
        }
        std::copy(counts_.begin(), counts_.end(), counts);
    }

   private:
    enum Kind : uint8_t { kSpace, kAlone, kLetter, kMark };

    static Kind kind(char character) {
        const uint8_t byte = static_cast<uint8_t>(character);
        if (byte >= 128) return kLetter;  // whatever it is
        if (byte == ' ') return kSpace;
        if (byte == '\t' || (byte >= '0' && byte <= '9')) return kAlone;
        return (byte >= 'A' && byte <= 'Z') || (byte >= 'a' && byte <= 'z') ? kLetter : kMark;
    }

    void meet(Text word) {
        met_[met_count_] = Name(word);
        index_.fetch(met_[met_count_]);
        if (++met_count_ == kAhead) count_met();
    }

    void count_met() {
        for (int n = 0; n < met_count_; ++n) add(met_[n], 1);
        met_count_ = 0;
    }

    void add(const Name& name, int64_t times) {
        const int64_t* known = index_.find(name);
        if (!known) {
            index_.add(name, words());
            words_.push_back(name.text);
            counts_.push_back(times);
        } else {
            counts_[*known] += times;
        }
    }

    Name met_[kAhead];  // words to be counted
    int met_count_ = 0;
    Table<int64_t> index_;
    std::vector<Text> words_;
    std::vector<int64_t> counts_, last_;  // of words; of lines that end in so many spaces
    std::string spaces_;
};

}  // namespace

extern "C" {

// Count the words of texts, laid out as for spell_words; they must stay where they are until the words are taken. Writes
// how many words there are, and their bytes.
void* count_words(const char* text, const int64_t* ends, int64_t count, int64_t* words, int64_t* bytes) {
    auto* counter = new Counter;
    for (int64_t n = 0, start = 0; n < count; start = ends[n++]) counter->count(text + start, text + ends[n]);
    counter->end();
    *words = counter->words();
    *bytes = counter->bytes();
    return counter;
}

// The words one after the other, where each ends, and how often it came; the counter is gone then.
void take_words(void* counter, char* text, int64_t* ends, int64_t* counts) {
    static_cast<Counter*>(counter)->take(text, ends, counts);
    delete static_cast<Counter*>(counter);
}

// Pieces with their spaces one after the other, 16 bytes of anything behind them, where each ends, and their ids and scores; the ids of the
// 256 bytes; the kind of each character of Unicode; and the bytes of words after which all words are forgotten.
void* open_words(const char* pieces, const int64_t* ends, const int32_t* tokens, const float* scores, int64_t count,
                 const int32_t* bytes, const uint16_t* kinds, int64_t most_remembered) {
    return new Speller(pieces, ends, tokens, scores, count, bytes, kinds, most_remembered);
}

void close_words(void* speller) { delete static_cast<Speller*>(speller); }

// Texts in UTF-8 one after the other, 16 bytes of anything behind them, and where each ends. Writes their ids one after
// the other, at most as many as there are bytes of text, and perhaps two numbers behind them; and how many ids each
// text has. Returns how many all have.
int64_t spell_words(void* speller, const char* text, const int64_t* ends, int64_t count, int32_t* out,
                    int64_t* lengths) {
    return static_cast<Speller*>(speller)->spell(text, ends, count, out, lengths);
}
}
